"""Folders that peft wrote: an adapter (LoRA and its kin), which names the model that it was trained on."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dave_fast.errors import InputError, ModelError, UnknownModelError, missing
from dave_fast.models.huggingface_adapter import Transformers
from dave_fast.models.huggingface_files import ADAPTER, Place, named_class
from dave_fast.models.limits import limited_memory
from dave_fast.models.weights_file import check_fit, read_weights

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# these change weights; others add tokens to a text, have weights that the folder may lack, or compile code (BOFT)
_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "LN_TUNING")
_PREFIX = "base_model.model."
# settings that choose modules by patterns of their names
_PATTERNS = (
    "rank_pattern",
    "alpha_pattern",
    "layers_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layer_replication",
)
# relative difference of outputs in float32 up to which merged weights compute the same
_SAME = 1e-4


@dataclass(frozen=True)
class PeftFolder:
    """An adapter that peft wrote.

    Attributes:
        place: of its files.
        values: its configuration, the content of `ADAPTER`.
        has_config: whether the place has a config.json, too, which is then the whole model's.

    Raises:
        UnknownModelError: the configuration names no base model.
        MissingPackageError: peft is not installed.
        ModelError: the adapter's method is not supported.
    """

    place: Place
    values: Mapping[str, Any]
    has_config: bool

    def __post_init__(self) -> None:
        """Refuse what cannot be loaded."""
        name = self.place.name
        method = str(self.values.get("peft_type"))
        if method not in _TYPES:
            raise ModelError(
                f"{name} is an adapter of peft's method {method}, which is not supported; expected one of "
                f"{', '.join(_TYPES)}. Load it yourself, and give the module."
            )
        if self.values.get("megatron_config"):
            raise ModelError(f"{name} is an adapter for Megatron (megatron_config), which is not supported.")
        if not self.base_name:
            raise UnknownModelError(
                f"the adapter {name} does not say which model it belongs to: write the place of that model into "
                f"base_model_name_or_path of its {ADAPTER}, or load both yourself, and give the module."
            )
        if importlib.util.find_spec("peft") is None:
            raise missing("hf", f"{name}, an adapter,", "peft")

    @property
    def base_name(self) -> str:
        """The place of the model that the adapter was trained on, as the adapter names it."""
        return str(self.values.get("base_model_name_or_path") or "")

    def base(self) -> Place:
        """Return the place of the model that the adapter was trained on.

        A relative path counts from the adapter's folder or from the current one, wherever there is such a folder.

        Raises:
            UnknownModelError: it is a path, and there is no such folder, or a relative one and there are two.
        """
        beside, here = Path(self.place.name, self.base_name), Path(self.base_name)
        if self.place.local and beside.is_dir():
            if here.is_dir() and not here.samefile(beside):
                raise UnknownModelError(
                    f"the adapter {self.place.name} was trained on {self.base_name}, which may be {beside.resolve()} "
                    f"or {here.resolve()}: write the whole path into base_model_name_or_path of {ADAPTER}."
                )
            return Place(str(beside), local=True)
        try:
            return Place.of(self.base_name, str(self.values.get("revision") or ""))
        except UnknownModelError as error:
            raise UnknownModelError(
                f"the adapter {self.place.name} was trained on {self.base_name}, and there is no such folder here: "
                f"copy that model here, and write its place into base_model_name_or_path of {ADAPTER}."
            ) from error

    def named_class(self, config: Any) -> Any:
        """Return the class of the model that the adapter was trained on; None where the adapter does not say.

        Raises:
            ModelError: it is no class of transformers.
        """
        mapping = self.values.get("auto_mapping") or {}
        name, library = str(mapping.get("base_model_class") or ""), str(mapping.get("parent_library") or "")
        if name and not library.startswith("transformers."):
            raise ModelError(
                f"the adapter {self.place.name} was trained on the class {name} of {library}, which is no part of "
                "transformers: load both yourself, and give the module."
            )
        return named_class(name, config, self.place.name) if name else None

    def head_width(self, weights: Mapping[str, Tensor]) -> int | None:
        """Return the outputs of the heads that the adapter has saved whole; None if there is none, or they differ.

        Args:
            weights: see `weights`.
        """
        heads = tuple(f".{name}.weight" for name in self.values.get("modules_to_save") or ())
        widths = {tensor.shape[0] for name, tensor in weights.items() if name.endswith(heads) and tensor.dim() == 2}
        return int(widths.pop()) if len(widths) == 1 else None

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter's tensors, by their names in the file.

        Raises:
            UnknownModelError: there is no file of them.
            InputError: it cannot be read, or holds other objects.
        """
        path = self.place.file(*_WEIGHTS)
        if path is None:
            raise UnknownModelError(f"the adapter {self.place.name} has no weights: it lacks {' and '.join(_WEIGHTS)}.")
        return read_weights(path)

    def applied(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return the model with the adapter, merged into its weights where that computes the same.

        Args:
            model: is changed in place.
            weights: see `weights`.

        Raises:
            InputError: the weights do not fit the model.
            ModelError: the adapter was written by a later version of peft.
        """
        from peft import PeftModel, set_peft_model_state_dict

        settings, weights = _renamed(model, self._settings(), weights)
        with warnings.catch_warnings():
            # of transformers, about a name that peft uses
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # of the rank that the settings name, whatever the files hold
            with limited_memory(self.place.name if self.place.local else None):
                wrapped = PeftModel(model, settings).eval()
        try:
            found: Any = set_peft_model_state_dict(wrapped, dict(weights))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise InputError(
                f"the weights of the adapter {self.place.name} do not fit {self.base_name}: {reason}"
            ) from error
        # the rank of AdaLoRA is no tensor of the file: peft sets it from the configuration
        missing = [key for key in found.missing_keys if ".default" in key and ".ranknum." not in key]
        check_fit(self.place.name, self.base_name, missing, found.unexpected_keys, ())
        merged = copy.deepcopy(wrapped).merge_and_unload()
        before, after = (_example_output(each) for each in (wrapped.get_base_model(), merged))
        same = before is not None and after is not None and (after - before).norm() <= _SAME * before.norm()
        return merged if same else wrapped.get_base_model()

    def _settings(self) -> Any:
        """Return peft's configuration, for inference."""
        import peft

        kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.values["peft_type"]]
        known = {field.name for field in fields(kind)}
        later = [key for key, value in self.values.items() if value and key not in known and key != "peft_version"]
        if later:
            raise ModelError(
                f"the adapter {self.place.name} has settings that peft {peft.__version__} does not know "
                f"({', '.join(sorted(later))}): install a later version of peft."
            )
        settings = {key: value for key, value in self.values.items() if key in known}
        return kind(**(settings | {"inference_mode": True}))


def saved_by(weights: Mapping[str, Tensor]) -> set[str]:
    """Return the names of an adapter's tensors in its base model, which has those of `modules_to_save`."""
    return {name.removeprefix(_PREFIX) for name in weights}


def _renamed(model: nn.Module, settings: Any, weights: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Tensor]]:
    """Return settings and weights of LoRA with the names that modules have in this version of transformers.

    Args:
        model: the base model.
        settings: of peft.
        weights: of the adapter, by their names in the file.

    Raises:
        ModelError: the settings name modules by patterns, which cannot be renamed.
    """
    targets = {name.partition(".lora_")[0] for name in saved_by(weights) if ".lora_" in name}
    if targets <= {name for name, _ in model.named_modules()}:
        return settings, weights
    now = _earlier_names(model)
    if not targets <= now.keys():
        # peft says which modules it does not find
        return settings, weights
    patterns = [each for each in _PATTERNS if getattr(settings, each, None)]
    patterns += ["target_modules as a pattern"] if isinstance(settings.target_modules, str) else []
    if patterns:
        raise ModelError(
            f"the adapter names its modules as an earlier version of transformers did, with {', '.join(patterns)}: "
            "load it with that version, merge it (merge_and_unload), and save the whole model."
        )
    ends = tuple(f".{name}" for name in settings.target_modules)
    settings.target_modules = {now[name] for name in now if f".{name}".endswith(ends)}
    renamed = {}
    for name, tensor in weights.items():
        own = name.removeprefix(_PREFIX)
        module = max((each for each in now if own.startswith(f"{each}.")), key=len, default="")
        renamed[f"{_PREFIX}{now.get(module, module)}{own[len(module) :]}"] = tensor
    return settings, renamed


def _earlier_names(model: nn.Module) -> dict[str, str]:
    """Return the present name of each module by the name that it has in files of weights, as earlier versions had."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        # versions before 5 rename no modules
        return {}
    found = {}
    for name, tensor in model.state_dict().items():
        in_file = list(revert_weight_conversion(model, {name: tensor}))
        if len(in_file) == 1:
            found[in_file[0].rpartition(".")[0]] = name.rpartition(".")[0]
    return found


def _example_output(model: nn.Module) -> Tensor | None:
    """Return a model's output for one image; None where it cannot be tried."""
    return Transformers(model, None, "", "", own_head=True).tried()
