"""Small models, and kernels as a user may give them to `dave-fast bench --kernel`: right ones and wrong ones."""

import torch

from dave_fast.ops.attention import attention_vjp_ref
from dave_fast.ops.linear import linear_ref
from dave_fast.ops.norm import row_rstd_ref
from tests.tiny import initial_vit


def model():
    return initial_vit(embed_dim=32, num_classes=10)


def gated_model():
    return initial_vit(embed_dim=32, depth=1, num_classes=10, mlp_layer=gated, mlp_ratio=2.0)


def gated(in_features, hidden_features, **settings):
    from timm.layers import GluMlp

    settings = {key: settings[key] for key in ("bias", "drop") if key in settings}
    return GluMlp(in_features, 2 * hidden_features, act_layer=torch.nn.SiLU, gate_last=False, **settings)


def own_linear(x, weight, bias=None, **epilogue):
    assert isinstance(weight, torch.Tensor) and not weight.is_mkldnn
    return linear_ref(x, weight, bias, **epilogue)


def own_attention_vjp(saved, d_out):
    return attention_vjp_ref(saved, d_out)


def own_row_rstd(x, eps, *, centred, squares=None):
    return row_rstd_ref(x, eps, centred=centred, squares=squares)


def wrong_row_rstd(x, eps, *, centred, squares=None):
    return 1.001 * row_rstd_ref(x, eps, centred=centred, squares=squares)


def row_rstd_without_eps(x, *, centred):
    return x


def row_rstd_without_centred(x, eps):
    return x


def pack_without_arguments():
    return None


def linear_without_gate(x, weight, bias=None, *, row_scale=None, activation=None, residual=None, squares=False):
    return linear_ref(x, weight, bias, row_scale=row_scale, activation=activation, residual=residual, squares=squares)


calls_of_tired = []


def tired_row_rstd(x, eps, *, centred, squares=None):
    """Return zeros from the fourth call on."""
    calls_of_tired.append(1)
    return row_rstd_ref(x, eps, centred=centred, squares=squares) * (len(calls_of_tired) < 4)


def careless_row_rstd(x, eps, *, centred, squares=None):
    """Leave the last row unwritten."""
    rstd = torch.empty(len(x))
    rstd[:-1] = row_rstd_ref(x, eps, centred=centred, squares=squares)[:-1]
    return rstd
