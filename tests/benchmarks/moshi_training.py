"""The same training steps with Kyutai's PyTorch modules, eager on the CPU: see `training`.

`LMModel.forward` refuses to train a model without a depformer, so its own `forward_text` is called here, with its own
delays around it. `MimiModel.forward` decodes the whole clip and does not hand out the first codebook; so its parts are
called here in the same order.

Shape letters: B batch rows, M streams (text first), T frames of codes or samples, N frames of audio or of a
spectrogram, D latent width, C codebook width, L labels, V vocabulary, F frequency bins.
"""

import dataclasses
from collections.abc import Callable

import torch
from moshi.models import LMModel, MimiModel, loaders
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from moshi.modules.conv import StreamingConv1d
from moshi.quantization.core_vq import EuclideanCodebook
from moshi.quantization.vq import ResidualVectorQuantizer
from torch import nn
from torch.nn import functional as F

from dsm_jax.configs import LMConfig, MimiConfig, ModelConfig
from dsm_jax.convert import kyutai_config
from dsm_jax.training.losses.codec import QUIET, SCALES
from dsm_jax.training.step import OptimizerConfig
from tests.benchmarks import training
from tests.benchmarks.training import CodecCase, LmCase
from tests.benchmarks.worker import Step
from tests.parity.references.kyutai import lm_config

_FLOOR = 1e-3  # magnitude floor, as in `dsm_jax.training.losses.codec`


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, the loss of a batch, and the optimizer."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: OptimizerConfig


class CodecTrainee(nn.Module):
    """The reference's codec with the semantic head, made of the reference's convolutions."""

    def __init__(self, config: MimiConfig, labels: int, hidden: int = 96):
        super().__init__()
        self.mimi = make_mimi(config)
        self.head = nn.Sequential(
            StreamingConv1d(config.quantizer.dimension, hidden, 6, causal=True),
            nn.ELU(),
            StreamingConv1d(hidden, labels, 4, causal=True),
        )
        self.train()


def make(task: str, tiny: bool) -> Step:
    """Make the step of `task`, with the reference's own initial weights."""
    torch.manual_seed(0)
    if task == "train_lm_step":
        case = training.TINY_LM if tiny else LmCase()
        return start(train_lm(case, make_lm(case.config)))
    case = training.TINY_CODEC if tiny else CodecCase()
    return start(train_codec(case, CodecTrainee(case.config, case.labels)))


def make_lm(config: LMConfig) -> LMModel:
    """Make the reference's language model, float32, for training."""
    files = kyutai_config.Files(kyutai_config.LM_NAME, kyutai_config.MIMI_NAME, None, None)
    values = kyutai_config.write_config(ModelConfig(model_type="stt", lm=config), config, files)
    return loaders.get_moshi_lm(None, lm_config(values), dtype=torch.float32).train()


def make_mimi(config: MimiConfig) -> MimiModel:
    """Make the reference's codec, for training."""
    return loaders.get_mimi(None, kyutai_config.write_mimi_config(config), num_codebooks=config.quantizer.n_q).train()


def train_lm(case: LmCase, lm: LMModel) -> Training:
    """Set up the training of the reference's language model."""
    codes_BMT = torch.from_numpy(case.codes()).long()
    weight_V = torch.ones(case.config.text_logits)
    weight_V[case.config.existing_text_padding_id] = case.objective.padding_weight
    return Training(lm, lambda: lm_loss(lm, codes_BMT, weight_V), case.optimizer)


def lm_loss(lm: LMModel, codes_BMT: torch.Tensor, weight_V: torch.Tensor) -> torch.Tensor:
    """Compute the loss of `dsm_jax.training.losses.stt.stt_loss`."""
    initial_BM1 = lm._get_initial_token().expand(len(codes_BMT), -1, -1)
    delayed_BMT = torch.cat([initial_BM1, _delay_sequence(lm.delays, codes_BMT, initial_BM1)], dim=2)
    _, logits_B1TV = lm.forward_text(delayed_BMT[:, :, :-1])
    logits_B1TV, known_B1T = _undelay_sequence(lm.delays[:1], logits_B1TV, fill_value=0.0)
    target_BT = torch.where(known_B1T[:, 0], codes_BMT[:, 0], -1)
    return F.cross_entropy(logits_B1TV.flatten(0, 2), target_BT.flatten(), weight_V, ignore_index=-1)


def train_codec(case: CodecCase, trainee: CodecTrainee) -> Training:
    """Set up the training of the reference's codec."""
    pcm_BT, labels_BN = map(torch.from_numpy, case.sound())
    labels_BN, most = labels_BN.long(), case.frames - case.objective.decoded_frames

    books = [module for module in trainee.modules() if isinstance(module, EuclideanCodebook)]

    def loss() -> torch.Tensor:
        for book in books:
            # The entries that the reference writes would keep the graphs of all earlier steps.
            book.embedding_sum.detach_()
        return codec_loss(trainee, pcm_BT, labels_BN, torch.randint(most + 1, (case.rows,)).tolist(), case)

    return Training(trainee, loss, case.optimizer)


def codec_loss(
    trainee: CodecTrainee, pcm_BT: torch.Tensor, labels_BN: torch.Tensor, first_B: list[int], case: CodecCase
) -> torch.Tensor:
    """Compute the loss of `dsm_jax.training.losses.codec.codec_loss`, for the frames from `first_B` on."""
    mimi, objective, size = trainee.mimi, case.objective, case.config.frame_size
    (latents_BDN,) = mimi.encoder_transformer(mimi.encoder(pcm_BT[:, None]))
    latents_BDN = mimi._to_framerate(latents_BDN)
    semantic_BCN, first_loss = quantize(mimi.quantizer.rvq_first, latents_BDN)
    acoustic_BCN, rest_loss = quantize(mimi.quantizer.rvq_rest, latents_BDN)
    decoded_BDN = mimi.quantizer.rvq_first.output_proj(semantic_BCN) + mimi.quantizer.rvq_rest.output_proj(acoustic_BCN)

    logits_BLN = trainee.head(semantic_BCN)[:, :, objective.look_ahead :]
    semantic = F.cross_entropy(logits_BLN, labels_BN[:, : -objective.look_ahead], ignore_index=-1)

    window = objective.decoded_frames
    cut_BDN = torch.stack([row_DN[:, i : i + window] for row_DN, i in zip(decoded_BDN, first_B, strict=True)])
    target_BT = torch.stack([row_T[i * size :][: window * size] for row_T, i in zip(pcm_BT, first_B, strict=True)])
    (decoded_BDN,) = mimi.decoder_transformer(mimi._to_encoder_framerate(cut_BDN))
    made_BT = mimi.decoder(decoded_BDN)[:, 0]
    level_B1 = target_BT.square().mean(1, keepdim=True).sqrt().clamp(min=QUIET)
    waveform = ((target_BT - made_BT).abs() / level_B1).mean()
    loss = stft_loss(target_BT, made_BT) + objective.waveform * waveform
    return loss + objective.commitment * (first_loss + rest_loss) + objective.semantic * semantic


def quantize(branch: ResidualVectorQuantizer, latents_BDN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a branch's `forward` up to its projection: straight-through vectors, and the commitment loss."""
    result = branch.vq(branch.input_proj(latents_BDN), n_q=branch.n_q)
    return result.quantized, result.loss.mean()


def magnitudes(x_BT: torch.Tensor, window: int) -> torch.Tensor:
    """Compute magnitudes [B, F, N] of a short-time Fourier transform."""
    hann_W = torch.hann_window(window) * (4 / window)
    spectrum_BFN = torch.stft(x_BT, window, window // 4, window=hann_W, center=False, return_complex=True)
    return (spectrum_BFN.real.square() + spectrum_BFN.imag.square() + _FLOOR**2).sqrt()


def stft_loss(x_BT: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """Compute the loss of `dsm_jax.training.losses.codec.stft_loss`."""
    total = torch.zeros(())
    for window in SCALES:
        x_BFN, y_BFN = magnitudes(x_BT, window), magnitudes(y_BT, window)
        linear = (x_BFN - y_BFN).abs().mean() / (x_BFN.mean() + _FLOOR)
        total = total + (x_BFN.log() - y_BFN.log()).abs().mean() + linear
    return total / len(SCALES)


def start(training: Training) -> Step:
    """Make a step that continues from the step before, and returns the loss after its update."""
    config = training.optimizer
    parameters = list(training.model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, (config.b1, config.b2), weight_decay=config.weight_decay, fused=True
    )

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = training.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        return loss.item()

    return run
