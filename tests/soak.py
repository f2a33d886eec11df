"""A run under random SIGKILLs: `python tests/soak.py [--profile demo] [--kills 30] [--every 40] [--whole RUN] [--only STAGE] RUN` kills, starts again, and compares with a whole run.

At random moments it kills the command, one of its processes or all of them, until the run has ended. If that took fewer kills than were asked for, it
begins anew in another folder. Each run must leave the same files as the undisturbed one, but for times, memory, dates and the pages that show them.
With --only, these stages alone are run, in a copy of the undisturbed run.
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml
from conftest import PIPELINE, TOOLS

COMMAND = [str(TOOLS / "blip2mgm"), "run"]
TOLD = re.compile(r"second|time|start|memory|machine|version|sha|hash|path|file|rate|peak|elapsed|date|cpu|pid|frozen|repeat by|^run$")  # keys whose values tell of the run, not of what was found
PAGES = ("report.html", "report.md", "report.ipynb", "comparison.json")
VIEWS = re.compile(r"\.(ipynb|html|log|svg|png|md|part)$|before\.json$|\.lock$|tfevents|\.sqlite|/(trace|monitor|logs?|dj|tables)/")  # pages, logs and stores that show times


def places_of(run: Path, stage: str) -> list[Path]:
    "What a stage writes"
    return [run / stage, *({"explore": [run / "data"], "report": [run / page for page in PAGES]}.get(stage, []))]


def without(whole: Path, run: Path, stages: list[str]) -> None:
    "Copies a whole run but for what some stages wrote"
    shutil.copytree(whole, run, symlinks=True)
    for p in [p for s in stages for p in places_of(run, s)]: shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)


def stage_now(run: Path) -> str:
    "The first stage that has not ended"
    return next((s for s in PIPELINE if not (run / s / "record.json").is_file()), "over")


def strike(process: subprocess.Popen, rng: random.Random) -> str:
    "Kills the command, one of its processes, or the whole group"
    command = psutil.Process(process.pid)
    try: family = command.children(recursive=True)
    except psutil.Error: family = []
    what = rng.choice(["all", "command", "one"] if family else ["command"])
    victims = {"all": [command, *family], "command": [command], "one": rng.sample(family, 1) if family else [command]}[what]
    for p in victims:
        try: p.send_signal(signal.SIGKILL)
        except psutil.Error: pass
    return what


def soak(profile: str, run: Path, every: float, rng: random.Random) -> Counter:
    "Runs a profile to its end while its processes are killed; how many kills of which kind hit which stage"
    hits, lives = Counter(), Counter()
    while True:
        with (run.parent / f"{run.name}.log").open("a") as log:
            process = subprocess.Popen([*COMMAND, profile, "--run", str(run)], stdout=log, stderr=log, start_new_session=True)
            stage = stage_now(run)
            try: status = process.wait(rng.uniform(0.1, 1.9) * every * 1.3 ** (lives[stage] // 8))
            except subprocess.TimeoutExpired: status = None
        if status == 0: return hits
        if status is None:
            stage = stage_now(run)
            hits[stage, strike(process, rng)] += 1
            try: process.wait(120)  # a command whose worker was killed ends by itself, or goes on without it
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        elif status not in (1, -signal.SIGKILL): raise SystemExit(f"{profile} ended with {status}; see {log.name}")
        lives[stage] += 1
        print(f"{sum(hits.values())} kills, in {stage}", flush=True)


def told(x):
    "A value without what differs from run to run"
    if isinstance(x, dict): return {k: told(v) for k, v in x.items() if not TOLD.search(k)}
    return [told(v) for v in x] if isinstance(x, list) else x


def essence(file: Path, *runs: Path) -> object:
    "What a file says, without times and places"
    if file.suffix not in (".json", ".jsonl", ".yaml"): return hashlib.sha256(file.read_bytes()).hexdigest()
    text = file.read_text(encoding="utf-8")
    for run in runs: text = text.replace(str(run), "RUN")  # what was copied still names the place it comes from
    if file.suffix == ".yaml": return told(yaml.safe_load(text))
    found = [json.loads(line) for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else json.loads(text)
    if file.name == "record.json": found = {k: v for k, v in found.items() if k not in ("outputs", "upstream")}  # hashes of files that are compared themselves, logs with times among them
    return told(found)


def differences(run: Path, whole: Path) -> dict[str, list[str]]:
    "The files of one run that the other lacks, and those that say something else; pages and logs aside"
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file() and not VIEWS.search("/" + str(p.relative_to(r)))} for r in (run, whole)]
    both = sorted(names[0] & names[1])
    return {"compared": both, "only here": sorted(names[0] - names[1]), "only there": sorted(names[1] - names[0]),
            "different": [n for n in both if essence(run / n, run, whole) != essence(whole / n, whole)]}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="folder for the runs that are killed")
    p.add_argument("--profile", default="demo")
    p.add_argument("--kills", type=int, default=30, help="at least so many")
    p.add_argument("--every", type=float, default=40, help="seconds from start to kill, on average")
    p.add_argument("--whole", type=Path, help="an undisturbed run of the same profile; made if it is not given")
    p.add_argument("--only", nargs="+", default=[], choices=PIPELINE, metavar="STAGE", help="run these stages alone, in a copy of the whole run")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    run, rng, hits, bad, rounds = a.run.resolve(), random.Random(a.seed), Counter(), False, 0
    run.mkdir(parents=True, exist_ok=True)
    whole = (a.whole or run / "whole").resolve()
    if not a.whole: subprocess.run([*COMMAND, a.profile, "--run", str(whole)], check=True)
    while sum(hits.values()) < a.kills:
        rounds, start = rounds + 1, time.monotonic()
        shutil.rmtree(run / f"killed{rounds}", ignore_errors=True)
        if a.only: without(whole, run / f"killed{rounds}", a.only)
        found = soak(a.profile, run / f"killed{rounds}", a.every, rng)
        hits += found
        d = differences(run / f"killed{rounds}", whole)
        bad |= bool(d["only here"] or d["only there"] or d["different"])
        print(f"round {rounds}: {sum(found.values())} kills in {time.monotonic() - start:.0f} s; {len(d.pop('compared'))} files compared; {json.dumps(d)}")
    print("kills: " + ", ".join(f"{stage} {what} {n}" for (stage, what), n in sorted(hits.items())))
    return int(bad)


if __name__ == "__main__": sys.exit(main())
