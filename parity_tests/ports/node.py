"""A Node.js process that answers one JSON object a line, which the ports of npm packages call."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np


def packed(array: Any) -> dict[str, Any]:
    """Return an array as an object that JSON holds, with the name of its type as ONNX has it."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"type": array.dtype.name, "dims": array.shape, "data": data}


def unpacked(value: dict[str, Any]) -> Any:
    flat = np.frombuffer(base64.b64decode(value["data"]), value["type"])
    return flat.reshape(value["dims"]).copy()


class Node:
    """A process of a script beside this file; it ends with this one."""

    def __init__(self, script: str) -> None:
        file = Path(__file__).with_name(script)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(["node", str(file)], **pipes)  # type: ignore[call-overload]

    def __call__(self, ask: str, **message: Any) -> Any:
        """Call a function of the script; return what it returns. RuntimeError: what it threw."""
        self.process.stdin.write(json.dumps({"ask": ask, **message}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"node ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["found"]
