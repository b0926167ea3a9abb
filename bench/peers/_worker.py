"""The process of a peer: JSON requests a line on stdin, JSON replies a line on stdout.

``python -m bench.peers._worker NAME``. Whatever a library prints goes to stderr.
"""

import dataclasses
import gc
import json
import os
import sys
import threading
import time
from typing import Any

from bench.peers import NotSupported, Peer, Stretches, load
from bench.record import package_versions


def main() -> None:
    """Serve requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = _answer(sys.argv[1], json.loads(line), state)
        except NotSupported as reason:
            reply = {"unsupported": _line(reason)}
        except MemoryError as error:
            reply = {"error": f"out of memory: {_line(error)}"}
        except Exception as error:  # a peer may raise anything: its row says what
            reply = {"error": describe(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _end_with(parent: int) -> None:
    """A parent that is killed cannot end its peers, and one in the middle of a request would not notice."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def describe(error: Exception) -> str:
    """One line for what a library raised."""
    text = _line(error)
    memory = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OutOfMemory")
    known = "out of memory: " if any(m in f"{type(error).__name__} {text}" for m in memory) else ""
    return f"{known}{type(error).__name__}: {text}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _answer(name: str, request: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    peer: Peer = load(name)
    do = request["do"]
    if do == "available":
        return {"why": peer.available()}
    if do == "open":
        state.clear()
        gc.collect()
        begin = time.perf_counter()
        state["peer"] = peer.open(request["job"])
        return {"load_s": time.perf_counter() - begin, "versions": package_versions(peer.packages)}
    if do == "generate":
        drawing = {"sampled": True} if request.get("sampled") else {}  # ours alone are asked for it
        output = state["peer"].generate(request["prompts"], request["new_tokens"], **drawing)
        return dataclasses.asdict(output) | {"peak_bytes": state["peer"].peak_bytes()}
    if do == "begin":
        state["stretches"] = state["peer"].run(**request["args"])
    if do in ("begin", "go on"):
        return _go_on(state["stretches"])
    # What only some peers offer: a case of an operation, a check, ceilings.
    return getattr(state["peer"], do)(**request.get("args", {}))


def _go_on(stretches: Stretches) -> dict[str, Any]:
    """What the next stretch ends with: the whole result, or nothing yet."""
    try:
        next(stretches)
    except StopIteration as end:
        return {"result": end.value}
    return {"result": None}


if __name__ == "__main__":
    main()
