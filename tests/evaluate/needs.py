"""Marks for tests of packages that cannot be installed together with the others."""

from importlib.util import find_spec

import pytest


def _lxt_imports() -> bool:
    if find_spec("lxt") is None:
        return False
    try:
        import lxt.efficient.models.vit_torch  # noqa: F401
    except ImportError:
        return False
    return True


lxt = pytest.mark.skipif(
    not _lxt_imports(), reason="LXT 2.1 needs transformers 4, whose huggingface_hub is older: pip install '.[lrp]'"
)
