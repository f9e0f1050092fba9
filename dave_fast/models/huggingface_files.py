"""Repositories and folders of Hugging Face: their configurations, image processors and weights.

No code in them is run: what names code of its own (`auto_map`) is refused, and weights are tensors alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dave_fast.errors import InputError, ModelError, UnknownModelError
from dave_fast.files import read_json
from dave_fast.models.limits import check_configuration, limited_memory
from dave_fast.models.spec import ModelSpec
from dave_fast.models.weights_file import read_weights

NO_CODE = {"trust_remote_code": False}
# of peft, transformers and timm, and open_clip
ADAPTER = "adapter_config.json"
CONFIGURATIONS = (ADAPTER, "config.json", "open_clip_config.json")
# the scheme of timm and open_clip for folders
_LOCAL = "local-dir:"
# an attention whose operators the frozen route can intercept
SEEN_ATTENTION = (None, "sdpa", "eager")


@dataclass(frozen=True)
class Place:
    """A repository or a folder.

    Attributes:
        name: ORG/NAME, or the path of the folder.
        revision: branch, tag or commit of a repository.
        local: whether it is a folder.
    """

    name: str
    revision: str = ""
    local: bool = False

    @classmethod
    def of(cls, name: str, revision: str = "") -> Place:
        """Return the place of a name: a folder, or ORG/NAME[@REVISION].

        Raises:
            UnknownModelError: there is no such folder.
        """
        if not name.startswith((".", "~", os.sep)) and not os.path.isdir(name):
            repository, _, at = name.partition("@")
            return cls(repository, at or revision)
        folder = os.path.expanduser(name)
        if not os.path.isdir(folder):
            raise UnknownModelError(
                f"'hf:{name}': there is no folder {folder}; give one that save_pretrained wrote, or hf:ORG/NAME."
            )
        return cls(folder, local=True)

    @staticmethod
    def folder_of(name: str) -> str | None:
        """Return the folder of a name by which timm and open_clip know it; None for a model of theirs or of the hub."""
        return name.removeprefix(_LOCAL) if name.startswith(_LOCAL) else None

    @property
    def at(self) -> str:
        """The revision, "main" by default."""
        return self.revision or "main"

    @property
    def scheme(self) -> str:
        """The name by which timm and open_clip know it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_LOCAL}{self.name}" if self.local else f"hf-hub:{self.name}{revision}"

    def file(self, *names: str) -> Path | None:
        """Return the first of these files that is there; None if none is."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for name in names:
            if self.local:
                if Path(self.name, name).is_file():
                    return Path(self.name, name)
                continue
            try:
                return Path(hf_hub_download(self.name, name, revision=self.at))
            except LocalEntryNotFoundError:
                # without a network, a repository on this machine has the files that were downloaded with it
                if not self._is_cached():
                    raise
            except EntryNotFoundError:
                continue
        return None

    def _is_cached(self) -> bool:
        """Return whether a configuration of the repository is on this machine."""
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(self.name, each, revision=self.at) for each in CONFIGURATIONS)
        return any(isinstance(each, str) for each in found)

    def read(self, *names: str) -> dict[str, Any] | None:
        """Return the first of these JSON files that is there; None if none is.

        Raises:
            ModelError: it names code of its own.
        """
        path = self.file(*names)
        if path is None:
            return None
        try:
            values = check_configuration(read_json(path), str(path))
        except InputError as error:
            raise ModelError(str(error)) from error
        if values.get("auto_map"):
            raise ModelError(
                f"{self.name} has code of its own ({path.name} has auto_map), which is not run: import that code "
                "yourself, and give the module that it makes."
            )
        return values

    def processor(self, *, local_files_only: bool = False) -> dict[str, Any] | None:
        """Return the settings of the image processor; None without one."""
        from transformers import AutoImageProcessor

        if not local_files_only:
            # a processor with code of its own is refused here
            self.read("preprocessor_config.json", "processor_config.json")
        try:
            processor = AutoImageProcessor.from_pretrained(
                self.name, revision=self.at, local_files_only=local_files_only, **NO_CODE
            )
        except OSError:
            return None
        except ValueError:
            # a module's processor has code of its own, or names none: its preprocessing is not known
            if not local_files_only:
                raise
            return None
        return dict(processor.to_dict())

    def configuration(self, **settings: Any) -> Any:
        """Return the configuration of a model of transformers.

        Raises:
            ModelError: its weights are quantised.
        """
        from transformers import AutoConfig, PretrainedConfig

        config: Any = AutoConfig.from_pretrained(self.name, revision=self.at, **NO_CODE, **settings)
        refuse_quantised(config, self.name)
        # what else the model may return is not needed, and attention weights exist in the slow attention alone
        for each in (config, *vars(config).values()):
            if isinstance(each, PretrainedConfig):
                each.output_attentions = each.output_hidden_states = False
                each.return_dict = True
        return config


def refuse_quantised(config: Any, name: str) -> None:
    """Raise ModelError for a model whose weights are quantised."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        known = quantised if isinstance(quantised, Mapping) else vars(quantised)
        method = known.get("quant_method", "a method that is not named")
        raise ModelError(
            f"the weights of {name} are quantised ({getattr(method, 'value', method)}), which is not supported: give "
            "the model that they were made from, in floating point."
        )


def named_class(name: str, config: Any, place: str) -> Any:
    """Return the class of transformers that a configuration names.

    Raises:
        ModelError: transformers has no such class, or it is one for another configuration.
    """
    import transformers

    found: Any = getattr(transformers, name, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not known:
        raise ModelError(
            f"{place} was saved by the class {name}, which transformers {transformers.__version__} does not have: "
            "import your own class, and give the module that it loads (MODULE:FUNCTION on the command line)."
        )
    wanted = found.config_class
    if wanted is not None and not isinstance(config, wanted):
        raise ModelError(
            f"the configuration of {place} is a {type(config).__name__}, and its class {name} takes a "
            f"{wanted.__name__}: correct model_type or architectures in its config.json."
        )
    return found


def build(kind: Any, config: Any, place: Place, spec: ModelSpec) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model of transformers in float32 with the weights of its place, or of the spec.

    Args:
        kind: its class.
        config: its configuration.
        place: of its weights.
        spec: of the model.

    Returns:
        The model, and the report of `from_pretrained` about keys (empty for random weights). Weights that are missing
        there, or have another shape, are random in the model.

    Raises:
        InputError: the spec's weights cannot be read.
    """
    folder = place.name if place.local else None
    if spec.random_weights:
        # from_config of a class itself is private
        with limited_memory(folder):
            return _with_known_attention(partial(kind._from_config, config, dtype=torch.float32)), {}
    settings = {"config": config, "dtype": torch.float32, "output_loading_info": True}
    # weights of other shapes are in the report, too
    settings["ignore_mismatched_sizes"] = True
    if spec.weights is None:
        with limited_memory(folder):
            return _with_known_attention(
                partial(kind.from_pretrained, place.name, revision=place.at, weights_only=True, **settings)
            )
    # on the meta device, for its names alone
    with torch.device("meta"):
        own = kind._from_config(config).state_dict()
    weights = read_weights(spec.weights, own)
    # from_pretrained renames parameters of earlier versions, as it does for a folder
    with limited_memory(folder, spec.weights):
        return _with_known_attention(partial(kind.from_pretrained, None, state_dict=weights, **settings))


def _with_known_attention(make: Callable[..., Any]) -> Any:
    """Make a model with an attention whose operators the frozen route can intercept."""
    try:
        return make(attn_implementation="sdpa")
    except ValueError as error:
        if "attention" not in str(error):
            raise
        return make(attn_implementation="eager")


@contextmanager
def no_code(name: str) -> Iterator[None]:
    """Keep other libraries from running, or asking on the terminal to run, code that transformers finds in a place.

    Args:
        name: of the model, for messages.

    Raises:
        ModelError: there is such code.
    """
    try:
        from transformers import dynamic_module_utils
    except ImportError:
        yield
        return
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    # without time for an answer there is no question
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise ModelError(
            f"{name} needs code of its own, in its text tower or its tokenizer, which is not run: import that code "
            "yourself, and give the module that it makes."
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch off the progress bar for reading weights; those of downloads stay."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
