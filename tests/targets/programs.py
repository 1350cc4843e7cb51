"""The library's programs over shapes in place of arrays, compiled for a device of `tests.targets.devices`.

Models are published ones, or these with fewer layers: layouts and copies depend on widths, windows and heads, and
layers are alike.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsm_jax import codec
from dsm_jax.configs import MimiConfig, ModelConfig
from dsm_jax.csm import program as csm
from dsm_jax.models import family
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.parameters import with_dtype
from dsm_jax.nn import quant
from dsm_jax.runtime.compile import compiled
from dsm_jax.runtime.steps import StepLimits
from dsm_jax.sharding import Sharding
from dsm_jax.streaming import KVCache
from dsm_jax.stt import program as stt
from dsm_jax.training import step as training
from dsm_jax.training.losses.codec import CodecObjective, CodecTrainee, codec_loss
from dsm_jax.training.losses.codec import merge as merge_codec
from dsm_jax.training.losses.codec import split as split_codec
from dsm_jax.training.losses.stt import SttObjective, stt_loss
from dsm_jax.tts import program as tts
from dsm_jax.tts import voices
from dsm_jax.tts.state import ConditionValues, TtsSettings
from dsm_jax.tts.words import WordMachine

VOICE_STEPS, PROMPT = 625, 512  # five voices of 10 s; positions of a conversation, 41 s
LAYERS, CODEBOOKS = 2, 8


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and the shapes of the state that it is given and gives back."""

    compiled: jax.stages.Compiled
    state: Any

    @property
    def caches(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes of keys and values, and of the voices' keys and values."""
        nodes = jax.tree.leaves(self.state, is_leaf=lambda node: isinstance(node, KVCache))
        held = jax.tree.leaves([node for node in nodes if isinstance(node, KVCache)])
        conditions = getattr(self.state, "conditions", None)
        return held + [leaf for leaf in jax.tree.leaves(conditions) if len(leaf.shape) == 4]


def nbytes(tree: Any) -> int:
    """Return the size of the arrays of a tree, in bytes, without a device's padding."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """Return the shape of an int32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def shortened(config: ModelConfig) -> ModelConfig:
    """Return a config with few layers and few generated codebooks, and as wide as before."""
    lm, conversational = config.lm, config.csm
    if lm is not None:
        lm = dataclasses.replace(lm, num_layers=LAYERS)
    if lm is not None and lm.dep_q:
        schedule = lm.depformer.weights_per_step_schedule[:CODEBOOKS]
        depformer = dataclasses.replace(lm.depformer, num_layers=1, weights_per_step_schedule=schedule)
        delays = lm.delays[: 1 + CODEBOOKS]
        lm = dataclasses.replace(lm, n_q=CODEBOOKS, dep_q=CODEBOOKS, delays=delays, depformer=depformer)
    if conversational is not None:
        backbone = dataclasses.replace(conversational.backbone, num_layers=LAYERS)
        depth = dataclasses.replace(conversational.depth, num_layers=1)
        conversational = dataclasses.replace(conversational, backbone=backbone, depth=depth, n_q=CODEBOOKS)
    return dataclasses.replace(config, lm=lm, csm=conversational, mimi=shortened_codec(config.mimi))


def shortened_codec(config: MimiConfig) -> MimiConfig:
    """Return a codec's config with few layers in its transformers, and few filters: the convolutions compile slowly."""
    seanet = dataclasses.replace(config.seanet, n_filters=16)
    transformer = dataclasses.replace(config.transformer, num_layers=LAYERS)
    return dataclasses.replace(config, seanet=seanet, transformer=transformer)


class Model:
    """A model without weights on a device, or split over several, and its programs.

    Args:
      config: config of the model.
      devices: one device, or several, over which layers are split.
      dtype: dtype of the language model.
      quantize: "int8", or None.
    """

    def __init__(self, config: ModelConfig, devices: Any, dtype: Any = jnp.bfloat16, quantize: str | None = None):
        self.config, self._sharding = config, None
        if len(devices) > 1:
            self._sharding = Sharding(jax.sharding.Mesh(devices, ("model",)))
        else:
            self._device = jax.sharding.SingleDeviceSharding(devices[0])
        networks = family.abstract_model(config, dtype=dtype, sharding=self._sharding)
        lm, mimi = networks["lm"], networks["mimi"]
        params = lm.unflatten(with_dtype("lm", lm.parameters, jnp.dtype(dtype)))
        if quantize:
            params = jax.eval_shape(quant.quantize, params)
        self.graphs = lm.graph, mimi.graph
        self.params = self.placed((params, mimi.state))

    def placed(self, tree: Any) -> Any:
        """Put the shapes of a tree on the device, or split them over the devices by their names."""
        one = self._sharding is None
        places = jax.tree.map(lambda _: self._device, tree) if one else self._sharding.places(tree)
        return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree, places)

    def compile(self, function: Callable, settings: Any, state: Any, *args: Any) -> Program:
        """Compile a function of the networks that is given a state, which is donated."""
        run = compiled(function, self.graphs, settings, donate=(0,))
        return Program(run.compile(self.params, self.placed(state), *map(self.placed, args)), state)

    def programs(self, slots: int) -> dict[str, Callable[[], Program]]:
        """Return functions that compile the model's programs, by name."""
        return {"stt": self._stt, "tts": self._tts, "csm": self._csm}[self.config.model_type](slots)

    def _stt(self, slots: int) -> dict[str, Callable[[], Program]]:
        def step(frames: int, ahead: int) -> Program:
            settings = stt.SttSettings(slots, ahead=ahead)
            pcm = jax.ShapeDtypeStruct((slots, frames * self.config.mimi.frame_size, 1), jnp.float32)
            inputs = stt.SttInputs(pcm, ints(slots))
            return self.compile(stt.step, settings, self._state(stt.init_state, settings), inputs)

        def insert() -> Program:
            settings = stt.SttSettings(slots)
            state = self._state(stt.init_state, settings)
            return self.compile(stt.insert, settings, state, ints(slots), state.request)

        return {"insert": insert, "step": lambda: step(1, 1), "chunk": lambda: step(4, 4)}

    def _tts(self, slots: int) -> dict[str, Callable[[], Program]]:
        lm = self.config.lm
        machine = WordMachine(lm.text_card + 1, self.config.tts.second_stream_ahead)
        settings = TtsSettings(slots=slots, machine=machine, delay_steps=16, voice_steps=VOICE_STEPS)
        state = self._state(tts.init_state, settings)
        values, masks = jax.eval_shape(lambda: voices.absent(lm, 1, VOICE_STEPS))
        conditions = ConditionValues(values, masks, ints(1))
        given = ints(1), _one(state.request), conditions
        return {
            "insert": lambda: self.compile(tts.insert, settings, state, *given),
            "step": lambda: self.compile(tts.step, settings, state, _limits(slots)),
        }

    def _csm(self, slots: int) -> dict[str, Callable[[], Program]]:
        settings = csm.CsmSettings(slots=slots, positions=self.config.csm.backbone.context)
        state = self._state(csm.init_state, settings)
        given = ints(1), _one(state.request), ints(1, self.config.csm.n_q + 1, PROMPT), ints(1)
        return {
            "insert": lambda: self.compile(csm.insert, settings, state, *given),
            "step": lambda: self.compile(csm.step, settings, state, _limits(slots)),
        }

    def _state(self, init: Callable, settings: Any) -> Any:
        return compiled(init, self.graphs, settings).shapes(self.params)


def _one(request: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), request)


def _limits(slots: int) -> StepLimits:
    return StepLimits(ints(), jax.ShapeDtypeStruct((slots,), bool), jax.ShapeDtypeStruct((), bool))


def _on(device: Any, tree: Any) -> Any:
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)


def codec_step(config: MimiConfig, device: Any, part: str, rows: int, frames: int) -> Program:
    """Compile a step of `dsm_jax.codec`, "encode" or "decode"."""
    network = nnx.eval_shape(lambda: Mimi(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(network)
    half, codebooks = (network.encoder, 8) if part == "encode" else (network.decoder, None)
    state = jax.eval_shape(lambda: half.init_state(rows))
    samples = jax.ShapeDtypeStruct((rows, frames * config.frame_size, 1), jnp.float32)
    given = samples if part == "encode" else ints(rows, 8, frames)
    run = compiled(getattr(codec, f"{part}_step"), (graph,), codebooks, donate=(1,))
    return Program(run.compile((_on(device, params),), _on(device, given), _on(device, state)), state)


def lm_training_step(config: ModelConfig, device: Any, rows: int, frames: int) -> Program:
    """Compile a training step of a speech-to-text model in float32."""
    network = family.abstract_model(config)["lm"]

    def loss(params: Any, frozen: Any, aux: Any, codes_BMT: jax.Array, key: jax.Array) -> Any:
        value, metrics = stt_loss(nnx.merge(network.graph, params), codes_BMT, key, SttObjective())
        return value, (aux, metrics)

    return _training_step(loss, network.state, (), ints(rows, config.lm.n_q + 1, frames), device)


def codec_training_step(config: MimiConfig, device: Any, rows: int, frames: int) -> Program:
    """Compile a training step of a codec."""
    mimi = functools.partial(Mimi, config, block_frames=None)
    graphs = []

    def parts() -> Any:
        graph, params, aux = split_codec(CodecTrainee(mimi(rngs=nnx.Rngs(0)), 40, rngs=nnx.Rngs(0)), fresh=False)
        graphs.append(graph)
        return params, aux

    params, aux = jax.eval_shape(parts)
    (graph,) = graphs

    def loss(params: Any, frozen: Any, aux: Any, batch: Any, key: jax.Array) -> Any:
        return codec_loss(merge_codec(graph, params, aux), aux, batch, key, CodecObjective(decoded_frames=frames // 2))

    pcm = jax.ShapeDtypeStruct((rows, frames * config.frame_size), jnp.float32)
    return _training_step(loss, params, aux, {"pcm_BT": pcm, "labels_BN": ints(rows, frames)}, device)


def _training_step(loss: training.Loss, params: Any, aux: Any, batch: Any, device: Any) -> Program:
    optimizer: optax.GradientTransformation = training.OptimizerConfig().build(100)
    state = jax.eval_shape(lambda params, aux: training.init(params, optimizer, 0, aux=aux), params, aux)
    step = training.make_step(loss, optimizer)
    return Program(step.lower(_on(device, state), _on(device, batch)).compile(), state)
