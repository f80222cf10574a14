"""A cloud in a folder, and the gcloud that speaks to it: the tests of launch/tpu_vm.sh put this file on the PATH by that name.

The folder, $WORLD, holds the state of one slice (`node`) and of the request for it (`queue`), each as states that follow one
another; the home of the slice's one worker; `plan`, how the next commands of a user end; and `calls`, a line of JSON for each
call. What is sent to the worker is run there, with a python, a pip and a curl that note in `worker` that they were called, and
then do what `does` says.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# Makes a virtual environment's python and pip.
MAKE = """
mkdir -p "$1/bin"
for tool in python pip; do
  printf '#!/bin/bash\\necho "%s $*" >>"$WORLD/worker"\\nexport tool=%s; . "$WORLD/does"\\n' $tool $tool >"$1/bin/$tool"
  chmod +x "$1/bin/$tool"
done
"""
# The image's python: asked for its version it answers what `image` says, otherwise it makes a virtual environment.
PYTHON3 = f"""#!/bin/bash
if [ "$1" = -c ]; then
  exec {sys.executable} -c 'import sys; sys.version_info = tuple(map(int, sys.argv[2].split("."))); exec(sys.argv[1])' \\
    "$2" "$(cat "$WORLD/image")"
fi
echo "python3 $*" >>"$WORLD/worker"
bash "$WORLD/make" "$3"
"""
# curl fetches an installer of a uv that makes one too.
CURL = r"""#!/bin/bash
echo "curl $*" >>"$WORLD/worker"
cat <<'INSTALL'
mkdir -p "$UV_INSTALL_DIR"
printf '#!/bin/bash\necho "uv $*" >>"$WORLD/worker"\nbash "$WORLD/make" "${@: -1}"\n' >"$UV_INSTALL_DIR/uv"
chmod +x "$UV_INSTALL_DIR/uv"
INSTALL
"""


def build(world: Path) -> None:
    """Makes an empty cloud, and `bin`, the folder to put on the PATH."""
    for name in ("home", "bin", "tmp"):
        (world / name).mkdir()
    tools = {"gcloud": f'#!/bin/bash\nexec {sys.executable} -S {__file__} "$@"\n', "python3": PYTHON3, "curl": CURL}
    for name, text in tools.items():
        (world / "bin" / name).write_text(text)
        (world / "bin" / name).chmod(0o755)
    for name, text in {"make": MAKE, "does": "exit 0", "image": "3.11.0"}.items():
        (world / name).write_text(text)


def _describe(world: Path, place: Path) -> str | None:
    """The state that a slice or a request is in; a request that comes true brings the slice with it."""
    if (world / "offline").exists():
        return "There was a problem refreshing your current auth tokens"
    if not place.exists():
        return "NOT_FOUND: Resource was not found."
    now, *later = place.read_text().split()
    print(now)
    place.write_text(" ".join(later) or now)
    if place.name == "queue" and now == "ACTIVE" and not (world / "node").exists():
        (world / "node").write_text("READY")


def _create(world: Path, place: Path) -> str | None:
    """A new slice, whose disks are empty, or a request for one."""
    if (world / "full").exists():
        return "There is no more capacity in the zone"
    shutil.rmtree(world / "home")
    (world / "home").mkdir()
    place.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE" if place.name == "queue" else "CREATING READY")


def _ssh(world: Path, command: str) -> int:
    """Runs a command on the worker; returns its status, or what `plan` has for it if it is a user's."""
    plan, step = world / "plan", ""
    if "runs/$id" in command and plan.exists():
        step, *later = plan.read_text().split() or [""]
        plan.write_text(" ".join(later))
    if step.startswith("preempted"):
        (world / "node").write_text(step.partition(":")[2] or "PREEMPTED")
        if (world / "queue").exists():
            (world / "queue").write_text("SUSPENDED")
        return 255
    shell = ["bash", "-c", command]
    # What the launcher's own environment holds is not there on another machine.
    home = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "OTHER")} | {"HOME": str(world / "home")}
    if step == "broken":  # the connection breaks while the command runs, and gcloud tries again
        first = subprocess.Popen(shell, env=home, start_new_session=True)
        while not list((world / "home").glob(".jaxpost/runs/*/pid")):
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        (world / "go").touch()
    status = subprocess.run(shell, env=home).returncode
    return int(step) if step.isdigit() else status


def main(argv: list[str]) -> int:
    """One call of gcloud compute tpus KIND VERB ...; returns its exit status."""
    world, (kind, verb) = Path(os.environ["WORLD"]), argv[2:4]
    place = world / {"tpu-vm": "node", "queued-resources": "queue"}[kind]
    call, error, status = {"argv": argv}, None, 0
    if verb == "scp":
        call["mode"] = oct(os.stat(argv[4]).st_mode & 0o777)
    if verb == "ssh":
        call["left"] = [str(p) for p in Path(os.environ["TMPDIR"]).glob("*/tokens")]
    with (world / "calls").open("a") as file:
        print(json.dumps(call), file=file)
    if verb == "describe":
        error = _describe(world, place)
    elif verb == "create":
        error = _create(world, place)
    elif verb == "delete":
        assert kind == "tpu-vm" or "--force" in argv
        (world / "node").unlink(missing_ok=True)
        place.unlink(missing_ok=True)
    elif verb == "start":
        place.write_text("READY")
    elif verb == "scp":
        shutil.copy(argv[4], world / "home" / argv[5].partition(":")[2])
    elif verb == "ssh":
        status = _ssh(world, next(a for a in argv if a.startswith("--command=")).partition("=")[2])
    if error:
        print(f"ERROR: (gcloud.{'.'.join(argv[:4])}) {error}", file=sys.stderr)
    return 1 if error else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
