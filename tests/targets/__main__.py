"""Print the memory that the published models need on devices that are not there, as a table, in MB.

A step and an insertion are compiled for some number of slots; a column says what a call needs besides the parameters
and the state.
"""

import argparse

from tests.targets import devices

MODELS = {"stt-1b": "STT_1B", "stt-2.6b": "STT_2_6B", "tts-1.6b": "TTS_1_6B", "csm-1b": "CSM_1B"}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.targets", description=__doc__)
    parser.add_argument("--devices", nargs="+", choices=devices.DEVICES, default=devices.DEVICES)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--weights", nargs="+", choices=["bfloat16", "int8"], default=["bfloat16", "int8"])
    parser.add_argument("--slots", type=int, default=8)
    args = parser.parse_args()
    devices.prepare()
    # They import JAX, which reads the environment.
    from dsm_jax.configs import presets
    from tests.targets.programs import Model, nbytes

    print("| device | model | weights | parameters | state of a slot | a step besides | an insertion besides |")
    print("|---|---|---|--:|--:|--:|--:|")
    for device in args.devices:
        for name in args.models:
            for weights in args.weights:
                config = getattr(presets, MODELS[name])
                quantize = "int8" if weights == "int8" else None
                model = Model(config, devices.devices(device)[:1], "bfloat16", quantize)
                programs = model.programs(args.slots)
                step, insert = programs["step"](), programs["insert"]()
                sizes = (
                    nbytes(model.params),
                    nbytes(step.state) / args.slots,
                    *(made.compiled.memory_analysis().temp_size_in_bytes for made in (step, insert)),
                )
                cells = [device, name, weights, *(f"{size / 1e6:,.0f}" for size in sizes)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
