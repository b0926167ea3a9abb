"""The process of a peer. Requests on stdin and replies on stdout are JSON, one object a line.

``python -m bench.peers._worker NAME``. Everything that a library prints goes to stderr.
"""

import dataclasses
import gc
import json
import os
import sys
import threading
import time
import traceback
from typing import Any

from bench.peers import NotSupported, Peer, Rounds, load
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
        except Exception as error:  # a peer may raise anything; its row shows the message
            traceback.print_exc()
            reply = {"error": describe(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _end_with(parent: int) -> None:
    """Watch the parent process, and end this one when the parent is killed. While this process computes an answer, it
    does not read from the parent, so it would not find out by itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def describe(error: Exception) -> str:
    """One line about an exception of a library."""
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
        load_s = time.perf_counter() - begin
        settings = getattr(state["peer"], "settings", {})
        return {"load_s": load_s, "versions": package_versions(peer.packages), "settings": settings}
    if do == "generate":
        drawing = {"sampled": True} if request.get("sampled") else {}  # only our backends get this request
        output = state["peer"].generate(request["prompts"], request["new_tokens"], **drawing)
        return dataclasses.asdict(output) | {"peak_bytes": state["peer"].peak_bytes()}
    if do == "begin":
        state["rounds"] = state["peer"].run(**request["args"])
    if do in ("begin", "go on"):
        return _go_on(state["rounds"])
    # Requests that only some peers offer, such as a check or ceilings.
    return getattr(state["peer"], do)(**request.get("args", {}))


def _go_on(rounds: Rounds) -> dict[str, Any]:
    """Run the next round. The reply has the whole result after the last round, before that None."""
    try:
        next(rounds)
    except StopIteration as end:
        return {"result": end.value}
    return {"result": None}


if __name__ == "__main__":
    main()
