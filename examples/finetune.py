"""Fine-tune a model on a folder of recordings, and count its errors on another folder before and after.

Each recording needs a JSON file of the same name with the words and their times, as `dsm-jax transcribe --format json`
writes it, so corrected transcripts can be trained on. Without arguments, the example trains `digits` on a new voice.
"""

import argparse
from pathlib import Path

import dsm_jax
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.step import OptimizerConfig

VOICE = Path(__file__).parent / "new_speaker"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=VOICE / "train", help="recordings to train on")
    parser.add_argument("--test", type=Path, default=VOICE / "test", help="recordings to count errors on")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--output", type=Path, default=Path("out/finetuned"), help="checkpoints, curve and model")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters; 0 trains the whole model")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    before = dsm_jax.evaluate(dsm_jax.load(args.model), args.test, normalizer="basic")
    print(f"before: {before.summary()}")
    config = FinetuneConfig(
        data=str(args.data),
        output=str(args.output),
        model=args.model,
        run=RunConfig(steps=args.steps, log_every=10, save_every=50),
        optimizer=OptimizerConfig(learning_rate=args.learning_rate, warmup=20),
        lora=LoraConfig(rank=args.rank) if args.rank else None,
    )
    model = finetune(config, resume=args.resume)
    after = dsm_jax.evaluate(model, args.test, normalizer="basic")
    print(f"after: {after.summary()}")
    print(f"dsm-jax transcribe --model {args.output / 'model'} RECORDING uses it from now on")


if __name__ == "__main__":
    main()
