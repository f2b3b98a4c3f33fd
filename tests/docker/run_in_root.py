"""Run a Dockerfile's steps, command for command, in a root that debootstrap made.

    debootstrap --variant=minbase bookworm /tmp/root
    python -m tests.docker.run_in_root --root /tmp/root --work /tmp/stages --target cpu \
        --model-cache ~/.cache/ponderttt/models/smollm2-135m

As root, on Linux. Each stage gets a copy of its base's root; RUN runs in a chroot with mounts of
its own, COPY copies what .dockerignore lets through, USER and ENV hold for what follows. At the end
the target's ENTRYPOINT and CMD serve a model, and its HEALTHCHECK, a completion and SIGTERM are
tried on it. What differs from a real build: no layers, no BuildKit; nothing confines the commands.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.docker.dockerfile import DOCKERFILE, ROOT, Instruction, Stage, lineage, read_stages

PORT = 8000


@dataclass(slots=True)
class Build:
    """A build under way.

    Args:
        base: root that stands for the base image.
        work: stages get a directory each in here.
        binds: directories and files of this machine that the steps may need (a cache, a mirror).
        inherited: environment that the steps get besides the Dockerfile's.
    """

    base: Path
    work: Path
    binds: list[Path]
    inherited: dict[str, str]
    stages: dict[str, Stage]
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    directory: dict[str, str] = field(default_factory=dict)
    user: dict[str, str] = field(default_factory=dict)

    def root(self, stage: str) -> Path:
        """A stage's root, made if it is not there yet."""
        path = self.work / stage
        if stage in self.environment:
            return path
        made = self.stages[stage]
        inherits = made.base in self.stages
        source = self.root(made.base) if inherits else self.base
        say(f"stage {stage}: from {made.base}")
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--reflink=auto", source, path], check=True)
        default = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.environment[stage] = dict(self.environment[made.base]) if inherits else default
        self.directory[stage] = self.directory[made.base] if inherits else "/"
        self.user[stage] = self.user[made.base] if inherits else "0:0"
        for instruction in made.instructions:
            self._apply(stage, instruction)
        return path

    def _apply(self, stage: str, step: Instruction) -> None:
        match step.name:
            case "RUN":
                begun = time.monotonic()
                self.run(stage, ["/bin/sh", "-c", step.value])
                say(f"  ok, {time.monotonic() - begun:.0f} s: RUN {step.value[:150]}")
            case "COPY":
                self._copy(stage, step)
                say(f"  ok: COPY {step.value} {step.flags or ''}")
            case "ENV":
                known = self.environment[stage]
                for word in step.words:
                    name, _, value = word.partition("=")
                    known[name] = value.replace("$PATH", known["PATH"])
            case "WORKDIR":
                self.directory[stage] = step.value
                self._below(stage, step.value).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user[stage] = step.value
            case "VOLUME" | "EXPOSE" | "STOPSIGNAL" | "ENTRYPOINT" | "CMD" | "HEALTHCHECK":
                pass
            case _:
                raise ValueError(f"this script does not know {step.name}")

    def _copy(self, stage: str, step: Instruction) -> None:
        source, target = step.words
        into = self._below(stage, os.path.join(self.directory[stage], target))
        if "from" in step.flags:
            origin = self.root(step.flags["from"]) / source.lstrip("/")
            # What is in the directory, not the directory, as COPY has it.
            subprocess.run(["cp", "-a", "--reflink=auto", f"{origin}/.", into], check=True)
            return
        for path in context(ROOT):
            place = into / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)

    def _below(self, stage: str, path: str) -> Path:
        return self.work / stage / path.lstrip("/")

    def command(
        self, stage: str, command: list[str], more: Mapping[str, str] | None = None
    ) -> list[str]:
        """What runs a command in a stage's root, with mounts that go away with it."""
        root = self.work / stage
        variables = {**self.inherited, **self.environment[stage], **(more or {})}
        script = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for path in self.binds:
            place = shlex.quote(f"{root}{path}")
            make = "mkdir -p" if path.is_dir() else f"mkdir -p $(dirname {place}) && touch"
            script.append(f"{make} {place} && mount --bind {shlex.quote(str(path))} {place}")
        inner = f"cd {shlex.quote(self.directory[stage])} && exec {shlex.join(command)}"
        script.append(
            f"exec chroot --userspec={self.user[stage]} {root} /usr/bin/env -i "
            + shlex.join([f"{name}={value}" for name, value in variables.items()])
            + f" /bin/sh -c {shlex.quote(inner)}"
        )
        return ["unshare", "--mount", "/bin/sh", "-ec", "\n".join(script)]

    def run(self, stage: str, command: list[str], more: Mapping[str, str] | None = None) -> None:
        """Run a command in a stage; CalledProcessError where it fails."""
        subprocess.run(self.command(stage, command, more), check=True)


def context(root: Path) -> Iterator[Path]:
    """The files that .dockerignore lets into the build (our forms of pattern only)."""
    lines = (root / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        parts = path.relative_to(root).parts
        ignored = False
        for pattern in patterns:
            negated, bare = pattern.startswith("!"), pattern.removeprefix("!")
            if bare.startswith("**/"):
                hit = any(fnmatch.fnmatch(part, bare[3:]) for part in parts)
            else:
                hit = fnmatch.fnmatch(parts[0], bare)
            if hit:
                ignored = not negated
        if not ignored:
            yield path


def serve(build: Build, target: str, model: str) -> None:
    """Run ENTRYPOINT and CMD, and try HEALTHCHECK, a completion and SIGTERM on them."""
    last: dict[str, Instruction] = {}
    for stage in lineage(build.stages, target):
        last.update({step.name: step for step in stage.instructions})
    command = last["ENTRYPOINT"].words + last["CMD"].words
    refused = subprocess.run(
        build.command(target, command, {"PONDERTTT_MODEL": model}), capture_output=True, text=True
    )
    if refused.returncode == 0 or "api-key-file" not in refused.stderr:
        raise RuntimeError(f"without keys it must not serve on 0.0.0.0: {refused.stderr[-500:]}")
    say("  ok: without keys it refuses: " + refused.stderr.strip().splitlines()[-1][:100])
    keys = "ponderttt keys new --id check --scope admin >/tmp/keys.toml 2>/tmp/key"
    build.run(target, ["/bin/sh", "-c", keys])
    variables = {
        "PONDERTTT_MODEL": model,
        "PONDERTTT_API_KEY_FILE": "/tmp/keys.toml",
        "PONDERTTT_MEASURE_COSTS": "0",
    }
    say(f"  CMD {command} with {variables}")
    with subprocess.Popen(build.command(target, command, variables)) as server:
        try:
            wait_healthy(build, target, last["HEALTHCHECK"], server)
            say("  ok: HEALTHCHECK")
            build.run(target, ["python", "-c", COMPLETION])
        finally:
            server.terminate()
        code = server.wait(60)
    if code != 0:
        raise RuntimeError(f"after SIGTERM the server ended with {code}, not 0")
    say("  ok: SIGTERM, exit code 0")


COMPLETION = f"""
import json, os, urllib.request
key = open("/tmp/key").readline().strip()
body = json.dumps({{"prompt": "def add(a, b):", "max_tokens": 8,
                   "ttt": {{"session": "check"}}}}).encode()
def post(path, body):
    request = urllib.request.Request("http://127.0.0.1:{PORT}" + path, body,
        {{"Authorization": "Bearer " + key, "Content-Type": "application/json"}})
    return json.load(urllib.request.urlopen(request, timeout=60))
post("/v1/sessions", json.dumps({{"id": "check"}}).encode())
answer = post("/v1/completions", body)["choices"][0]["text"]
print("  ok: as uid", os.getuid(), "a completion:", answer.encode())
try:
    open("/app/README.md", "a")
except OSError as error:
    print("  ok: the program's files can't be written:", error)
else:
    raise SystemExit("/app is writable")
"""


def wait_healthy(
    build: Build, target: str, check: Instruction, server: subprocess.Popen[bytes]
) -> None:
    """Wait until the health check passes."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        done = subprocess.run(build.command(target, check.words), stderr=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}; see above")
        time.sleep(2)
    raise RuntimeError("not healthy after 600 s")


def say(line: str) -> None:
    """Progress."""
    print(line, flush=True)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="made by debootstrap")
    parser.add_argument("--work", type=Path, required=True, help="for the stages; some GB")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--bind", type=Path, action="append", default=[], help="seen by the steps")
    parser.add_argument("--env", action="append", default=[], help="variable the steps inherit")
    parser.add_argument("--model-cache", type=Path, help="converted embedded model, not fetched")
    given = parser.parse_args()
    stages = read_stages(DOCKERFILE.read_text())
    for path in given.bind:
        if not path.exists():
            parser.error(f"--bind {path}: there is no such file or directory here")
    inherited = {name: os.environ[name] for name in given.env if name in os.environ}
    binds = [Path("/etc/resolv.conf"), *given.bind]
    build = Build(given.root, given.work, binds, inherited, stages)
    build.root(given.target)
    size = subprocess.run(["du", "-sm", given.work / given.target], capture_output=True, text=True)
    say(f"target {given.target}: {size.stdout.split()[0]} MB")
    if given.model_cache:
        models = given.work / given.target / "cache" / "models"
        models.mkdir(parents=True)
        shutil.copytree(given.model_cache, models / given.model_cache.name)
        subprocess.run(["chown", "-R", "10001:10001", models], check=True)
        serve(build, given.target, given.model_cache.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
