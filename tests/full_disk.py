"""The disk fills in each stage of a run: `unshare -rm python tests/full_disk.py [--profile smoke] --whole RUN FOLDER`, with RUN a finished run of the profile.

In a file system of its own (in memory; `unshare` gives the right to make one) each stage in turn finds too little room. It must end in one message that
says so; what was complete must stand; and once there is room, the run must come to the same files as the whole one.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import PIPELINE
from soak import COMMAND, differences, places_of, without


def size(*places: Path) -> int:
    "Bytes that files and folders take on a disk"
    return sum(-(-p.stat().st_size // 4096) * 4096 for place in places for p in [place, *place.rglob("*")] if p.exists())


def go(profile: str, run: Path) -> tuple[int, str]:
    "Runs a profile; its status and what it said"
    done = subprocess.run([*COMMAND, profile, "--run", str(run)], cwd="/", text=True, capture_output=True)
    return done.returncode, done.stdout + done.stderr


def filled(profile: str, whole: Path, disk: Path, stage: str, share: float) -> list[str]:
    "Runs a stage with room for a share of what it writes, then with all it needs; what went wrong"
    run, ballast = disk / "run", disk / "ballast"
    for p in (run, ballast): shutil.rmtree(p) if p.is_dir() else p.unlink(missing_ok=True)
    ended = PIPELINE[:PIPELINE.index(stage)]
    without(whole, run, PIPELINE[len(ended):])
    room = int(share * size(*places_of(whole, stage)))
    ballast.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))
    status, said = go(profile, run)
    print(f"== {stage}, room for {share:.0%} of what it writes ({room >> 10:,} KiB): status {status}\n{said[-700:]}", flush=True)
    wrong = [] if status in (1, 2) else [f"status {status}"]
    if "disk is full: make room" not in said and "are free: make room" not in said: wrong.append("no word of the disk")
    if "Traceback" in said: wrong.append("a traceback")
    ballast.unlink()
    status, said = go(profile, run)
    if status: return [*wrong, f"with room again: status {status}: {said[-500:]}"]
    wrong += [f"{s} was not kept" for s in ended if f"{s:<9} unchanged, kept" not in said]
    d = differences(run, whole)
    print(f"   with room again: {len(d.pop('compared'))} files compared; {d}", flush=True)
    return wrong + [f"{name}: {what}" for what, names in d.items() for name in names]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="an empty folder, where the small file system is mounted")
    p.add_argument("--whole", type=Path, required=True, help="a finished, undisturbed run of the same profile")
    p.add_argument("--profile", default="smoke")
    p.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.8], help="of what a stage writes there is room for")
    p.add_argument("--stages", nargs="+", default=PIPELINE, choices=PIPELINE, help="in which the disk fills")
    a = p.parse_args()
    whole, disk = a.whole.resolve(), a.folder.resolve()
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={3 * size(whole)}", "none", str(disk)], check=True)
    wrong = {(stage, share): filled(a.profile, whole, disk, stage, share) for stage in a.stages for share in a.shares}
    for (stage, share), what in wrong.items(): print(f"{stage:<9} {share:.0%}: {'; '.join(what) or 'well'}")
    return int(any(wrong.values()))


if __name__ == "__main__": sys.exit(main())
