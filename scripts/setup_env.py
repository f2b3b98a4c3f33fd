"""Make the virtual environment `.venv` and install what `make` needs into it.

    python3 scripts/setup_env.py runtime     what `make serve` needs
    python3 scripts/setup_env.py dev         and the tools of `make test` and `make lint`

PONDERTTT_TORCH=cpu or cuda chooses the build of torch; by default the machine's GPU, or the lack
of one, does. (An image for GPUs is made where there is none.)

Needs only the standard library. Safe to repeat (a stamp makes that fast), to interrupt (a
half-installed environment is made anew) and to start twice at once (the second waits).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
# What this script knows about the environment: which Python and which directory it was made for.
ORIGIN = VENV / "ponderttt-origin"
# There while pip is at work; found at the start, it means that pip was killed or failed half-way.
UNFINISHED = VENV / "ponderttt-unfinished"
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_VARIABLE = "PONDERTTT_TORCH"
# The pip that a distribution bundles may be too old to answer a dry run from metadata alone.
PIP = "pip>=25,<27"


class SetupError(Exception):
    """The set-up can't go on; the message says what to do."""


def main(arguments: list[str]) -> int:
    """Set up what `arguments` name; returns the exit code."""
    if arguments not in (["runtime"], ["dev"]):
        print(__doc__, file=sys.stderr)
        return 2
    profile = arguments[0]
    try:
        require_python(sys.version_info[:2], sys.executable)
        if stamp_path(profile).is_file() and stamp_path(profile).read_text() == stamp():
            return 0
        # The lock goes with this process, however it ends.
        with Path(__file__).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            make_environment()
            install(profile)
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def require_python(version: tuple[int, ...], executable: str) -> None:
    """Refuse a Python that the project does not run on."""
    if version < OLDEST:
        wanted, found = (".".join(map(str, numbers)) for numbers in (OLDEST, version))
        raise SetupError(
            f"Python {wanted} or newer is needed, and {executable} is {found}. Name another: "
            f"make PYTHON=/path/to/python{wanted} ..."
        )


def stamp_path(profile: str) -> Path:
    """The file that says a profile is installed; its text says from which inputs."""
    return VENV / f"ponderttt-{profile}.stamp"


def stamp() -> str:
    """A hash of everything that decides what gets installed."""
    digest = hashlib.sha256(origin().encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def origin() -> str:
    """What an environment belongs to: it survives neither another Python nor being moved."""
    return f"Python {platform.python_version()}\n{ROOT}\n"


def make_environment() -> None:
    """Create `.venv` unless a whole one for this Python and directory is there."""
    if VENV.exists() and any(VENV.iterdir()):
        if not ORIGIN.is_file():
            raise SetupError(f"{VENV} was not made by this script: move it away and try again")
        if not UNFINISHED.exists() and ORIGIN.read_text() == origin():
            return
        say("the virtual environment is unfinished or made for something else: making it anew")
        # Last of all goes the file by which we know it as ours, should this be interrupted too.
        for path in VENV.iterdir():
            if path != ORIGIN:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if importlib.util.find_spec("ensurepip") is None:
        install_venv_package()
    say(f"making a virtual environment with Python {platform.python_version()} in {VENV}")
    VENV.mkdir(exist_ok=True)
    ORIGIN.write_text(origin())
    UNFINISHED.touch()
    run([sys.executable, "-m", "venv", str(VENV)])
    pip("install", "--upgrade", PIP)
    UNFINISHED.unlink()


def install_venv_package() -> None:
    """Debian and Ubuntu keep a part of `venv` in a package of its own."""
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    as_root = root_prefix()
    if shutil.which("apt-get") is None or as_root is None:
        raise SetupError(
            f"this Python can't make virtual environments; on Debian or Ubuntu run "
            f"`sudo apt-get install {package}`, elsewhere install Python's venv and ensurepip"
        )
    say(f"installing the system package {package}, which Python needs for virtual environments")
    quiet = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run([*as_root, "apt-get", "update", "-q"], environment=quiet)
    for name in (package, "python3-venv"):
        command = [*as_root, "apt-get", "install", "-y", "-q", "--no-install-recommends", name]
        if run(command, environment=quiet, check=False) == 0:
            return
    raise SetupError(f"apt-get could not install {package}; its message is above")


def root_prefix() -> list[str] | None:
    """What to put before a command that needs root; None where we can't become root unasked."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and run(["sudo", "-n", "true"], check=False, quiet=True) == 0:
        return ["sudo", "-n"]
    return None


def install(profile: str) -> None:
    """Install torch, the project and, for `dev`, its tools."""
    if stamp_path(profile).is_file() and stamp_path(profile).read_text() == stamp():
        # Somebody else finished it while we waited for the lock.
        return
    UNFINISHED.touch()
    install_torch(pinned("torch"))
    say(f"installing ponderttt and what it needs ({profile})")
    extra = "[dev]" if profile == "dev" else ""
    pip("install", "-c", str(CONSTRAINTS), "-e", f"{ROOT}{extra}")
    UNFINISHED.unlink()
    stamp_path(profile).write_text(stamp())


def pinned(name: str) -> str:
    """The requirement `name==version` from the constraints."""
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SetupError(f"{CONSTRAINTS} does not pin {name}")


def install_torch(requirement: str) -> None:
    """Install the torch build that suits this machine: without a GPU, the small one for CPUs."""
    if installed_version("torch").partition("+")[0] == requirement.partition("==")[2]:
        return
    if wants_gpu():
        say(f"installing pip's default build of {requirement}, for GPUs")
        pip("install", "-c", str(CONSTRAINTS), requirement)
        return
    if pip_offers_cpu_build(requirement):
        say(f"installing the CPU build of {requirement}")
        pip("install", "-c", str(CONSTRAINTS), requirement)
        return
    say(f"pip's default would be a build for GPUs: fetching the CPU build of {requirement} by uv")
    pip("install", "uv")
    uv = [str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON)]
    if run([*uv, "--torch-backend=cpu", "-c", str(CONSTRAINTS), requirement], check=False) != 0:
        say(
            "WARNING: the CPU build could not be fetched (see above); taking pip's default build, "
            "which works as well but takes several GB of download and disk"
        )
        pip("install", "-c", str(CONSTRAINTS), requirement)


def wants_gpu() -> bool:
    """Whether torch is to use GPUs: as `PONDERTTT_TORCH` says, else if one is here."""
    chosen = os.environ.get(TORCH_VARIABLE, "")
    if chosen not in ("", "cpu", "cuda"):
        raise SetupError(f"{TORCH_VARIABLE} is {chosen!r}; set it to cpu or cuda, or not at all")
    return chosen == "cuda" if chosen else has_gpu()


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def pip_offers_cpu_build(requirement: str) -> bool:
    """Whether plain pip would install a build without GPU libraries.

    Only on Linux on x86-64 is the default build the one for GPUs.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return True
    command = [str(PYTHON), "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    result = subprocess.run(
        [*command, "--report", "-", requirement], stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        raise SetupError(f"pip finds no {requirement}; its message is above. Is there a network?")
    coming = json.loads(result.stdout)["install"]
    return any(item["metadata"]["version"].endswith("+cpu") for item in coming)


def installed_version(name: str) -> str:
    """The version of a package in the environment, empty where it is missing."""
    code = (
        "import sys; from importlib.metadata import distributions; "
        "print(next((d.version for d in distributions(name=sys.argv[1])), ''))"
    )
    return subprocess.run(
        [str(PYTHON), "-c", code, name], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def pip(*arguments: str) -> None:
    """Run the environment's pip."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    if run(command, check=False) != 0:
        raise SetupError(
            f"`pip {' '.join(arguments)}` failed; its message is above. Check the network and the "
            "disk, then run the same command again"
        )


def run(
    command: list[str],
    *,
    environment: dict[str, str] | None = None,
    check: bool = True,
    quiet: bool = False,
) -> int:
    """Run a command, its output on stderr; returns the exit code, which `check` wants to be 0."""
    output = subprocess.DEVNULL if quiet else sys.stderr
    code = subprocess.run(
        command, env=environment, stdout=output, stderr=output, check=False
    ).returncode
    if check and code != 0:
        raise SetupError(f"`{' '.join(command)}` ended with {code}; its message is above")
    return code


def say(line: str) -> None:
    """One line for people."""
    print(f"[setup] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
