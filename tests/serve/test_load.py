"""A small load of `tests/support/load.py`; a thousand clients for ten minutes are ``make load``."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from attack import KEY, figures
from load import Client, Load, jobs, run, settled
from serving import Live, wait_for


def test_every_answer_under_load_is_the_models_own_also_beside_clients_that_are_killed(
    make_live: Callable[..., Live], tmp_path: Path
) -> None:
    live, load, file = make_live(api_keys=(KEY,), queue=4096), Load(), tmp_path / "jobs.json"
    live.client.headers["authorization"] = f"Bearer {KEY}"
    file.write_text(json.dumps(jobs(10, 5, lambda body: live.complete(**body)["choices"][0]["text"], [{}])))
    files = figures(live.port)["process_open_fds"]
    asyncio.run(run(live.port, file, load, processes=3, clients=10, seconds=4, kill=1))
    load.wrong += settled(live.port, files)
    assert not load.wrong, load.text()
    assert load.done["ok"] >= 30
    assert load.done["killed"] >= 2
    wait_for(live.idle)


def test_another_text_and_a_lost_answer_are_seen(make_live: Callable[..., Live]) -> None:
    live = make_live(api_keys=(KEY,))
    good = {"prompt": "The cat", "max_tokens": 3, "temperature": 0, "stream": True}
    wrong = [{"body": good, "text": "something else"}, {"body": {"prompt": 7}, "text": ""}]
    for job, says in zip(wrong, ("another text", "lost"), strict=True):
        client = Client(live.port, [job], 0)

        async def once(client: Client = client) -> None:
            asyncio.get_running_loop().call_later(0.3, client._stop)
            await client._one()

        asyncio.run(once())
        assert says in client.wrong[0]
