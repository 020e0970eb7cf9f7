"""Families of models: a composition, its published sizes, and how its config is written elsewhere.

A family lists the keys of the foreign config once, as `Field` rows; reading and writing are the
two directions of that list. Reading is closed: a key that nobody maps is an error that names it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from lm.models.foreign import Weight
from lm.models.tasks import read_task, write_task
from lm.ops.rotary import Llama3Scaling, Rotary

REQUIRED = object()

# Keys of any Hugging Face config that say nothing about the function a model computes.
IGNORABLE = re.compile(
    r"_name_or_path|architectures|transformers_version|torch_dtype|dtype|use_cache|model_type"
    r"|(bos|eos|pad|sep|cls|mask|unk)_token_id|task_specific_params|id2label|label2id"
    r"|initializer_(range|factor)|problem_type|gradient_checkpointing|return_dict|auto_map"
    r"|(max|min)_length|num_beams|early_stopping|forced_eos_token_id|bad_words_ids"
    r"|(classifier|attention|attn|hidden|activation)_dropout|attention_probs_dropout_prob"
    r"|hidden_dropout_prob|(resid|embd|attn)_pdrop|dropout(_rate)?|static_position_embeddings"
    r"|pretraining_tp|summary_.*|n_ctx|prefix|vocab_size_or_config_json_file"
)
# Other keys that every config may carry, at the values that mean "off".
INERT = {
    "output_attentions": False,
    "output_hidden_states": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
}


class ForeignConfig:
    """A `config.json` that is read key by key; `finish` refuses what nobody asked for."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = dict(values)
        self.read: set[str] = set()

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """Returns the value of `key`, or the default where it is absent.

        Raises:
          ValueError: if it is absent and there is no default.
        """
        self.read.add(key)
        if key not in self.values and default is REQUIRED:
            raise ValueError(f"the config lacks {key!r}, which {self.model_type} needs")
        return self.values.get(key, default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuses any value of `key` but the allowed ones; an absent key is fine."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"config key {key!r} is {value!r}; for {self.model_type} only "
                f"{' or '.join(map(repr, allowed))} is implemented"
            )

    @property
    def model_type(self) -> str:
        return self.values.get("model_type", "this model")

    def finish(self) -> None:
        """Raises ValueError naming the keys that nothing read and that are not known as inert."""
        unknown = [
            f"{key}={value!r}"
            for key, value in self.values.items()
            if key not in self.read
            and not IGNORABLE.fullmatch(key)
            and not (key in INERT and value == INERT[key])
        ]
        if unknown:
            raise ValueError(
                f"config keys that {self.model_type} does not implement: {', '.join(unknown)}"
            )


@dataclasses.dataclass(frozen=True)
class Field:
    """One key of a foreign config, and where it lies in ours.

    Attributes:
      argument: the argument of the family's `build` that it sets.
      key: theirs.
      where: attributes from the model to the value, such as 'stack.pattern.blocks.0.mixer', or a
        function of the model.
      default: what an absent key means.
      names: their value -> ours, where the two differ; of several the first is written.
    """

    argument: str
    key: str
    where: str | Callable[[Any], Any]
    default: Any = REQUIRED
    names: Mapping[Any, Any] | None = None

    def read(self, config: ForeignConfig) -> Any:
        value = config.take(self.key, self.default)
        if self.names is None:
            return value
        config.expect(self.key, *self.names)
        return self.names[value]

    def write(self, model: nn.Module) -> dict:
        value = look_up(model, self.where)
        if self.names is not None:
            value = next((theirs for theirs, ours in self.names.items() if ours == value), None)
        return {self.key: value}


def look_up(model: Any, where: str | Callable[[Any], Any]) -> Any:
    """Follows dotted attributes and indices from a model, or calls `where` on it."""
    if callable(where):
        return where(model)
    for name in where.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


@dataclasses.dataclass(frozen=True)
class ActivationField(Field):
    """The name of an activation."""

    names: Mapping[Any, Any] | None = dataclasses.field(default_factory=lambda: ACTIVATIONS)


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclasses.dataclass(frozen=True)
class RotaryField:
    """Rotary positions, in both spellings.

    `rope_parameters`, and `rope_theta` beside `rope_scaling`: readers of either major version of
    transformers ignore the other spelling silently, so both are written.
    """

    argument: str
    where: str

    def read(self, config: ForeignConfig) -> Rotary:
        theta = config.take("rope_theta", 10000.0)
        scaling = config.take("rope_scaling", None) or {}
        rope = dict(config.take("rope_parameters", None) or scaling)
        theta = rope.pop("rope_theta", theta)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        if kind == "default" and not rope:
            return Rotary(theta)
        if kind != "llama3" or rope.keys() != set(LLAMA3_KEYS):
            raise ValueError(f"rotary scaling {kind!r} with {rope} is not implemented; 'llama3' is")
        return Rotary(theta, Llama3Scaling(**{LLAMA3_KEYS[key]: rope[key] for key in rope}))

    def write(self, model: nn.Module) -> dict:
        rotary = look_up(model, self.where)
        scaling = {}
        if rotary.scaling is not None:
            numbers = {key: getattr(rotary.scaling, ours) for key, ours in LLAMA3_KEYS.items()}
            scaling = {"rope_type": "llama3", **numbers}
        return {
            "rope_theta": rotary.theta,
            "rope_scaling": scaling or None,
            "rope_parameters": {"rope_type": "default", "rope_theta": rotary.theta, **scaling},
        }


LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: a composition, its published sizes, and its foreign form.

    Attributes:
      name: as in `lm list`.
      build: returns a model.
      presets: name -> arguments of `build`.
      tiny: arguments of `build` for a model that tests afford.
      ledger: rows of docs/ledger.md that it serves.
      classes: `model_type` of a config -> Hugging Face class; the first is the one written,
        unless `write_type` says otherwise.
      heads: ending of a class's name -> the task that it is for (lm/models/tasks.py), or further
        arguments of `build`; the first ends the names in `classes`. Empty: only those classes.
      fields: the config, key by key.
      fixed: keys that must have one of a few values; the first is written.
      inert: keys that may have any value, since they say nothing about the function computed.
      weights: returns the table of a model's weights.
      ignore: regular expressions of foreign tensors without weights of ours.
      write_type: returns the `model_type` of a model.
      inapplicable: test of the conformance table -> why it does not apply to this family.
    """

    name: str
    build: Callable[..., nn.Module]
    presets: Mapping[str, Mapping[str, Any]]
    tiny: Mapping[str, Any]
    ledger: tuple[str, ...] = ()
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, str | Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fields: Sequence[Field | RotaryField] = ()
    fixed: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    inert: tuple[str, ...] = ()
    weights: Callable[[Any], list[Weight]] | None = None
    ignore: tuple[str, ...] = ()
    write_type: Callable[[Any], str] | None = None
    inapplicable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def preset(self, name: str) -> nn.Module:
        """Returns the model of a published size; ValueError with the names there are."""
        if name not in self.presets:
            raise ValueError(f"{self.name} has presets {', '.join(self.presets)}, not {name!r}")
        return self.build(**self.presets[name])

    def read_config(self, values: Mapping[str, Any]) -> nn.Module:
        """Returns the model that a `config.json` describes; ValueError for any key unaccounted."""
        config = ForeignConfig(values)
        for key, allowed in self.fixed.items():
            config.expect(key, *allowed)
        for key in self.inert:
            config.take(key, None)
        arguments = {field.argument: field.read(config) for field in self.fields}
        heads = self._read_heads(config)
        if isinstance(heads, str):
            model = read_task(config, self.build(**arguments), heads)
        else:
            model = self.build(**arguments, **heads)
        config.finish()
        return model

    def write_config(self, model: nn.Module) -> dict:
        """Returns the `config.json` of a model of this family.

        Raises:
          ValueError: if the model is not of this family, or has what the format cannot say.
        """
        if not self.classes:
            raise ValueError(f"{self.name} has no Hugging Face form: {self.inapplicable['export']}")
        try:
            model_type = self.write_type(model) if self.write_type else next(iter(self.classes))
            values = {key: allowed[0] for key, allowed in self.fixed.items()}
            for field in self.fields:
                values.update(field.write(model))
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"this model is not a {self.name}") from error
        head = {"model_type": model_type, "architectures": [self.classes[model_type]]}
        values = {**head, **values, **write_task(model)}
        for name in self._class_names(model_type):
            values["architectures"] = [name]
            if self.read_config(values) == model:
                return values
        raise ValueError(f"this model is not a {self.name} that a Hugging Face config can say")

    def _class_names(self, model_type: str) -> dict[str, str | Mapping[str, Any]]:
        """Returns class -> heads, for each class of a `model_type`."""
        first = self.classes[model_type]
        prefix = first.removesuffix(next(iter(self.heads), ""))
        return {prefix + ending: heads for ending, heads in self.heads.items()} or {first: {}}

    def _read_heads(self, config: ForeignConfig) -> str | Mapping[str, Any]:
        """Reads what a config says only by the name of a class."""
        if not self.heads:
            return {}
        names = self._class_names(config.take("model_type", next(iter(self.classes))))
        name = (config.take("architectures", None) or list(names))[0]
        if name not in names:
            raise ValueError(
                f"the config is of class {name}; for {config.model_type} only "
                f"{', '.join(names)} is implemented"
            )
        return names[name]
