"""Stands where the trainer stands: `python fake_trainer.py FOLDER prepare|train RUN_JSON …` plays FOLDER/<stage>.jsonl.

A line is an event to print, or an instruction: {"do": "wait"} for SIGTERM, "deafen" (SIGTERM is ignored from here
on), "child" (start a process in a session of its own, its pid in FOLDER/child), "say" (on stderr), "print", "kill",
"tell" (the variable, in FOLDER/<stage>.<variable>).
After SIGTERM the rest of the script follows. The exit code is that of the last `finished` event.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

WAITING = {"event": "message", "level": "info", "text": "the fake trainer waits"}
awaited = {signal.SIGTERM}


def obey(instruction: dict[str, str], folder: Path, stage: str) -> None:
    match instruction["do"]:
        case "wait":
            print(json.dumps(WAITING), flush=True)
            signal.sigwait(awaited)
        case "deafen":
            awaited.clear()
            awaited.add(signal.SIGUSR1)
        case "child":
            sleeper = "import time; time.sleep(600)"
            child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
            (folder / "child").write_text(str(child.pid))
        case "say":
            print(instruction["text"], file=sys.stderr)
        case "print":
            print(instruction["text"], flush=True)
        case "tell":
            (folder / f"{stage}.{instruction['variable']}").write_text(os.environ[instruction["variable"]])
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    (folder / f"{stage}.arguments").write_text(json.dumps(sys.argv[3:]))
    (folder / f"{stage}.run.json").write_text(Path(sys.argv[3]).read_text())
    code = 0
    for line in (folder / f"{stage}.jsonl").read_text().splitlines():
        value = json.loads(line)
        if "do" in value:
            obey(value, folder, stage)
            continue
        assert os.environ["SFT_LOG_FORMAT"] == "json"
        print(line, flush=True)
        code = value.get("exitCode", code)
    return code


sys.exit(main())
