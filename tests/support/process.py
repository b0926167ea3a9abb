"""``jllama serve`` as a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEY = "sk-from-the-environment"
FLAGS = ("--slots", "2", "--port", "0", "--served-model-name", "demo")


class Process:
    """A server's process, from its ready line on. What it writes goes to files, which never fill up as pipes do."""

    def __init__(self, cache: Path | str, *flags: str, key: str = KEY, warm: bool = False, **env: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "jllama", "serve", *FLAGS, "--compilation-cache", str(cache)]
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        command += [] if warm else ["--no-warm-up"]
        with self._out.open("w") as out, self._err.open("w") as err:
            variables = os.environ | {"JLLAMA_API_KEY": key} | env
            self.process = subprocess.Popen([*command, *flags], env=variables, stdout=out, stderr=err)
        while (ready := re.search(r"ready at (http://127\.0\.0\.1:(\d+))\n", self.err)) is None:
            if self.process.poll() is not None:
                raise AssertionError(self.err)
            time.sleep(0.02)
        self.url, self.port = ready[1], int(ready[2])

    @property
    def out(self) -> str:
        """What has come on stdout."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """What has come on stderr."""
        return self._err.read_text()

    def end(self) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        """End it now, and forget what it wrote."""
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()
