"""The engine: two walks over a ViTPlan, written once against the ops.

    forward   tokens (R, n, C·p_h·p_w) -> output (R, ...), keeping P, the norms' 1/σ and the gates
    vjp       cotangent of the output -> cotangent of the tokens, with those operators held constant

(DAVE, arXiv 2602.06613, Eq. 3-5.) Between the patch embedding and the last block there is neither autograd nor a hook.
The tail (final norm, pooling, any head) is the model's own modules under the frozen route, which takes a few percent of
the time.
"""

from __future__ import annotations

from dave_fast.engine.bound_ops import BoundOps
from dave_fast.engine.forward_walk import ForwardWalk
from dave_fast.engine.vjp_walk import VjpWalk
from dave_fast.ops.fp8 import Scales
from dave_fast.plan.vit_plan import ViTPlan


class Engine:
    """The two walks over one plan, bound to the ops of one backend.

    Args:
        plan: the model.
        backend: a name of `ops._registry`, or "auto".
        narrow: "fp8" or "int8" where the blocks' matrix products take operands of eight bits.
        scales: static scales of e4m3 operands; an operand without one is scaled row by row.

    Attributes:
        plan: the model.
        ops: the bound ops.
        forward: tokens (R, n, C·p_h·p_w) -> the output (R, ...) and the operators for `vjp`.
        vjp: operators and a cotangent of the output -> the cotangent of the tokens.
    """

    def __init__(
        self,
        plan: ViTPlan,
        backend: str = "auto",
        *,
        narrow: str | None = None,
        scales: Scales | None = None,
    ) -> None:
        self.plan = plan
        self.ops = BoundOps(backend, plan.device, narrow=narrow, scales=scales)
        self.forward, self.vjp = ForwardWalk(plan, self.ops), VjpWalk(plan, self.ops)
