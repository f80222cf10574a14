"""launch/tpu_vm.sh against tests/fake_gcloud.py, which notes what it was asked and plays a slice of one worker.

What the launcher would run on the worker is really run, in a folder for a home: the scripts that it sends are tested, and not
only that it sends them. What gcloud does by itself was read in its source: a connection that breaks, which ssh reports as 255,
makes it run the command again.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcloud
import pytest

from jaxpost import recipe

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch" / "tpu_vm.sh"
SECRET = 'hf_s3cr3t value\'with "quotes"'
TRAIN = ("python", "-m", "jaxpost.train", "--config=configs/sft.py", "--config.data=it's here.jsonl", "--workdir=gs://b/w")


@pytest.fixture
def world(tmp_path):
    """A checkout with the launcher in it, an empty cloud, and a worker's home."""
    fake_gcloud.build(tmp_path)
    tree = tmp_path / "tree"
    (tree / "launch").mkdir(parents=True)
    shutil.copy(SCRIPT, tree / "launch")
    (tree / ".gitignore").write_text("runs/\n")
    (tree / "gone.py").write_text("")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    (tree / "gone.py").unlink()
    (tree / "new file.py").write_text("x = 1\n")
    (tree / "runs").mkdir()
    (tree / "runs" / "heavy").write_text("")
    yield tmp_path
    (tmp_path / "go").touch()  # whatever a failed test left waiting


def environment(world, **more) -> dict[str, str]:
    path = f"{world / 'bin'}:{os.environ['PATH']}"
    assert shutil.which("gcloud", path=path) == str(world / "bin" / "gcloud")  # never the machine's own
    return {**os.environ, "PATH": path, "WORLD": str(world), "TMPDIR": str(world / "tmp"), **more}


def launch(world, *options, command=TRAIN, shell=(), **env):
    arguments = ["--name=n", "--zone=z", "--type=v5litepod-8", "--poll=0", *options, *(["--", *command] if command else [])]
    script = [*shell, str(world / "tree" / "launch" / "tpu_vm.sh")]
    return subprocess.run(
        script + arguments, env=environment(world, **env), capture_output=True, text=True, timeout=60, cwd=world
    )


def calls(world) -> list[list[str]]:
    path = world / "calls"
    return [json.loads(line)["argv"] for line in path.read_text().splitlines()] if path.exists() else []


def short(argv: list[str]) -> str:
    """tpu-vm ssh run, queued-resources create, ...: what a gcloud command is for."""
    text = " ".join(argv)
    purpose = {"runs/$id": " run", "venv/bin/pip": " install", "mkdir -p -m 700": " prepare"}
    files = {"tree.tgz --": " tree", "tokens --": " tokens"}
    verb = argv[3]
    found = purpose if verb == "ssh" else files if verb == "scp" else {}
    return f"{argv[2]} {verb}" + next((v for k, v in found.items() if k in text), "")


def changes(world) -> list[str]:
    return [short(argv) for argv in calls(world) if "describe" not in argv]


def worker(world) -> list[str]:
    return (world / "worker").read_text().splitlines()


UNTIL_GO = "touch $WORLD/begun; until [ -f $WORLD/go ]; do sleep 0.05; done; echo ended"
ONCE = ["tpu-vm ssh prepare", "tpu-vm scp tree", "tpu-vm ssh install", "tpu-vm ssh run"]
WITH_TOKENS = [*ONCE[:3], "tpu-vm scp tokens", ONCE[3]]
PLAIN = ["tpu-vm create", *ONCE]


def test_shellcheck_has_no_complaint():
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not tool:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([tool, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def reset(world) -> None:
    """Another empty cloud."""
    for name in ("calls", "node", "queue", "worker"):
        (world / name).unlink(missing_ok=True)
    shutil.rmtree(world / "home")
    (world / "home").mkdir()


def same(argv: list[str]) -> list[str]:
    """Without what differs from one launch to the next: the run's number and the scratch folder."""
    return [re.sub(r"id=[\d-]+;", "id=ID;", re.sub(r"\S+/(tree\.tgz|tokens)$", r"\1", a)) for a in argv]


@pytest.mark.parametrize(
    "options, names",
    [
        (("--project=p",), ["tpu-vm describe", "tpu-vm create", "tpu-vm describe", *ONCE]),
        (
            ("--queued", "--spot", "--network=net"),
            ["queued-resources describe", "tpu-vm describe", "queued-resources create", "queued-resources describe"]
            + ["tpu-vm describe", *ONCE],
        ),
    ],
)
def test_a_dry_run_prints_every_command_in_order_and_runs_none(world, options, names):
    done = launch(world, "--dry-run", *options)
    assert done.returncode == 0, done.stderr
    assert not calls(world) and not list((world / "tmp").iterdir())
    # What it printed, run as a shell script, asks for what the launcher itself asks for.
    (world / "tmp" / "jaxpost-launch").mkdir()
    subprocess.run(["bash", "-c", done.stdout], env=environment(world), check=True, capture_output=True)
    printed = calls(world)
    assert [short(argv) for argv in printed] == names
    reset(world)
    assert launch(world, *options).returncode == 0
    real = [same(argv) for argv in calls(world) if "describe" not in argv]
    assert [same(argv) for argv in printed if "describe" not in argv] == real
    assert all("--zone=z" in argv and ("--project=p" in argv) == ("--project=p" in options) for argv in printed)
    create = next(argv for argv in printed if "create" in argv)
    assert ("--spot" in create, "--network=net" in create) == ("--spot" in options, "--network=net" in options)
    assert "--accelerator-type=v5litepod-8" in create and any(a.endswith("version=v2-alpha-tpuv5-lite") for a in create)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"# gcloud compute tpus {'queued-resources' if '--queued' in options else 'tpu-vm'} delete n ")


def test_a_slice_is_made_waited_for_and_given_the_tree_and_the_command(world):
    done = launch(world, shell=["bash", "-x"])
    assert done.returncode == 0, done.stderr
    assert changes(world) == PLAIN
    assert [short(argv) for argv in calls(world)].count("tpu-vm describe") == 3  # absent, CREATING, READY
    assert all("--worker=all" in argv for argv in calls(world) if argv[3] in ("ssh", "scp"))
    # Without it, ssh would wait for ever for a worker that was taken away.
    assert all("--ssh-flag=-oServerAliveInterval=15" in argv for argv in calls(world) if argv[3] == "ssh")
    home = world / "home"
    assert {str(p.relative_to(home / "jaxpost")) for p in (home / "jaxpost").rglob("*") if p.is_file()} == {
        ".gitignore",
        "launch/tpu_vm.sh",
        "new file.py",
    }
    assert (home / ".jaxpost").stat().st_mode & 0o777 == 0o700
    ran = f"python {' '.join(TRAIN[1:])}"  # the apostrophe and the space arrived
    assert worker(world) == ["python3 -m venv venv", f"pip install -q -e {home}/jaxpost[tpu,gcs]", ran]
    assert "tpu-vm delete n" in done.stderr.splitlines()[-1]  # what it costs to forget it


def test_what_left_the_tree_leaves_the_worker_and_what_was_written_there_stays(world):
    launch(world)
    (world / "tree" / "new file.py").unlink()
    (world / "home" / "jaxpost" / "written").write_text("")
    reused = launch(world)
    assert reused.returncode == 0 and changes(world) == PLAIN + ONCE  # the slice and its environment are used again
    left = {p.name for p in (world / "home" / "jaxpost").iterdir()}
    assert left == {".gitignore", "launch", "written"}
    assert [line for line in worker(world) if "venv" in line] == ["python3 -m venv venv"]


def test_an_older_python_is_replaced_by_uv(world):
    (world / "image").write_text("3.10.12")
    assert launch(world).returncode == 0
    curl, uv, pip, _ = worker(world)
    assert re.fullmatch(r"curl -LsSf https://astral.sh/uv/[\d.]+/install.sh", curl)
    assert uv == "uv venv --seed --python 3.12 venv" and pip.startswith("pip install -q -e ")
    assert not list((world / "home").glob(".[!j]*"))  # no profile was edited


@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_slice_is_made_again_and_the_same_command_runs_again(world, queued):
    (world / "plan").write_text("preempted preempted:TERMINATED")
    done = launch(world, "--spot", "--env=HF_TOKEN", *(["--queued"] if queued else []), HF_TOKEN=SECRET)
    assert done.returncode == 0, done.stderr
    kind = "queued-resources" if queued else "tpu-vm"
    made = [f"{kind} create", *WITH_TOKENS]
    assert changes(world) == [*made, f"{kind} delete", *made, f"{kind} delete", *made]
    commands = [a for argv in calls(world) for a in argv if "runs/$id" in a]
    assert len({same([c])[0] for c in commands}) == 1 and len(set(commands)) == 3
    assert len([line for line in worker(world) if "jaxpost.train" in line]) == 1


def test_it_gives_up_after_as_many_retries_as_were_allowed(world):
    (world / "plan").write_text("preempted " * 9)
    done = launch(world, "--spot", "--retries=2")
    assert done.returncode == 255 and changes(world).count("tpu-vm create") == 3
    assert "error: giving up on n after 3 attempts" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 2, 37])
def test_the_commands_status_is_the_launchers(world, status):
    (world / "does").write_text(f"[ $tool = pip ] || {{ echo out of $tool; exit {status}; }}")
    done = launch(world, "--spot")
    assert done.returncode == status and changes(world) == PLAIN  # a failure is no preemption
    assert re.fullmatch(r"\[.*\] out of python\n", done.stdout)  # the log alone, once, with the worker's name


def test_a_slice_that_cannot_be_reached_any_more_is_left_with_word_of_its_command(world):
    (world / "plan").write_text("255")
    done = launch(world)
    assert done.returncode == 255 and changes(world) == PLAIN
    assert "no longer watching" in done.stderr and "kill -- -" in done.stderr.splitlines()[-1]


def test_a_failed_installation_runs_no_command(world):
    (world / "does").write_text("[ $tool != pip ] || exit 9")
    done = launch(world)
    assert done.returncode == 9 and changes(world) == PLAIN[:-1]


def test_a_broken_connection_does_not_start_the_command_twice(world):
    (world / "does").write_text(f"[ $tool = pip ] || {{ {UNTIL_GO}; exit 4; }}")
    (world / "plan").write_text("broken")
    done = launch(world)
    assert done.returncode == 4
    assert len([line for line in worker(world) if "jaxpost.train" in line]) == 1
    assert done.stdout.count("ended") == 1


def test_a_command_that_ends_well_because_it_was_asked_to_is_not_done(world):
    """What a training does on a machine that goes down: it saves and exits with 0, before the slice's state says anything."""
    (world / "stop").write_text("")
    # READY to begin with and at the first look after the command; then the state follows.
    (world / "node").write_text("READY READY PREEMPTED")
    once = "[ $tool = pip ] || [ ! -f $WORLD/stop ] || { rm $WORLD/stop; trap 'exit 0' TERM; kill -TERM 0; }; exit 0"
    (world / "does").write_text(once)
    done = launch(world, "--spot")
    assert done.returncode == 0, done.stderr
    assert changes(world) == [*ONCE, "tpu-vm delete", *PLAIN]


def begin(world) -> subprocess.Popen:
    """A launch whose command has begun, and goes on until told."""
    (world / "does").write_text(f"[ $tool = pip ] || {{ {UNTIL_GO}; }}")
    first = subprocess.Popen(
        [world / "tree/launch/tpu_vm.sh", "--name=n", "--zone=z", "--type=v4-8", "--poll=0", "--", *TRAIN],
        env=environment(world),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (world / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return first


def test_a_second_command_does_not_run_beside_the_first(world):
    first = begin(world)
    second = launch(world)
    (world / "go").touch()
    assert second.returncode == 75 and "another command still runs" in second.stderr
    first.communicate(timeout=30)
    assert first.returncode == 0


def test_ctrl_c_ends_the_watching_and_says_how_to_end_the_command(world):
    first = begin(world)
    os.killpg(first.pid, signal.SIGINT)
    told = first.communicate(timeout=30)[1].splitlines()
    assert first.returncode == 130 and "no longer watching" in told[-2]
    (run,) = (world / "home/.jaxpost/runs").iterdir()
    assert not (run / "status").exists()
    subprocess.run(["bash", "-c", told[-1]], env=environment(world), check=True)
    deadline = time.monotonic() + 30
    while not (run / "status").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (run / "status").read_text() == "143\n" and not (world / "go").exists()


def everything(world) -> str:
    """All that was written down anywhere, but for the file that the test's own command wrote."""
    files = [p for p in world.rglob("*") if p.is_file() and p.name != "seen" and ".git" not in p.parts]
    return "".join(p.read_text(errors="replace") for p in files)


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--queued", "--spot")])
def test_values_of_variables_are_passed_on_and_shown_nowhere(world, options):
    (world / "does").write_text('[ $tool = pip ] || printf %s "$HF_TOKEN/$OTHER" >"$WORLD/seen"')
    done = launch(world, "--env=HF_TOKEN,OTHER", *options, shell=["bash", "-x"], HF_TOKEN=SECRET, OTHER="two\nlines")
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr + everything(world)
    assert "s3cr3t" not in shown and "two\nlines" not in shown and "two\\nlines" not in shown
    assert "HF_TOKEN" in shown
    if "--dry-run" not in options:
        assert (world / "seen").read_text() == f"{SECRET}/two\nlines"
        logged = [json.loads(line) for line in (world / "calls").read_text().splitlines()]
        assert [c["mode"] for c in logged if "tokens" in c["argv"][4]] == ["0o600"]
        assert logged[-1]["left"] == []  # gone from here before the command begins
        assert not list((world / "tmp").iterdir()) and not (world / "home/.jaxpost/tokens").exists()


@pytest.mark.parametrize(
    "start, expected",
    [
        ("READY", ONCE),
        ("STOPPED", ["tpu-vm start", *ONCE]),
        ("PREEMPTED", ["tpu-vm delete", *PLAIN]),
        ("REPAIRING READY", ONCE),
    ],
)
def test_a_slice_in_any_state_is_brought_up(world, start, expected):
    (world / "node").write_text(start)
    assert launch(world).returncode == 0
    assert changes(world) == expected


@pytest.mark.parametrize("start", ["SUSPENDED", "FAILED", "SUSPENDING SUSPENDED"])
def test_a_request_that_is_over_is_made_again(world, start):
    (world / "queue").write_text(start)
    assert launch(world, "--queued").returncode == 0
    assert changes(world) == ["queued-resources delete", "queued-resources create", *ONCE]


def test_no_capacity_ends_the_first_attempt_with_advice(world):
    (world / "full").write_text("")
    done = launch(world)
    assert done.returncode == 1 and "no more capacity" in done.stderr and "--queued" in done.stderr
    assert changes(world) == ["tpu-vm create"]


def test_a_question_that_gcloud_cannot_answer_is_no_absence(world):
    (world / "offline").write_text("")
    done = launch(world)
    assert done.returncode == 1 and "auth tokens" in done.stderr and not changes(world)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--zone=z --type=v4-8 -- x", "--name=... is required"),
        ("--name=n --type=v4-8 -- x", "--zone=... is required"),
        ("--name=n --zone=z -- x", "--type=... is required"),
        ("--name=n --zone=z --type=v4-8", "no command"),
        ("--name=n --zone=z --type", "--type needs a value"),
        ("--name=n --zone=z --type=v4-8 --tokens=hf_s3cr3t -- x", "unknown option --tokens;"),
        ("--name=n --zone=z --type=v4-8 --retries=many -- x", "--retries=many"),
        ("--name=n --zone=z --type=v4-8 --env=HF_TOKEN=hf_s3cr3t -- x", "names alone"),
        ("--name=n --zone=z --type=v4-8 --env=NOT_THERE -- x", "NOT_THERE"),
        ("--name=n --zone=z --type=v4-8 --env=HF_TOKEN -- x --token=hf_s3cr3t", "the value of HF_TOKEN"),
    ],
)
def test_wrong_options_end_with_one_message(world, arguments, message):
    done = subprocess.run(
        [world / "tree/launch/tpu_vm.sh", *shlex.split(arguments)],
        env=environment(world, HF_TOKEN="hf_s3cr3t"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout and not calls(world)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert "s3cr3t" not in done.stderr


def test_notes_say_what_would_go_wrong_later(world):
    local = ("python", "-m", "jaxpost.train", "--workdir=w")
    told = launch(world, "--dry-run", "--spot", "--type=v4-16", command=local).stderr
    assert "--distributed" in told and "gs://" in told
    assert not launch(world, "--dry-run", "--spot", "--type=v4-8").stderr


def test_help_is_the_scripts_own_opening():
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    options = set(re.findall(r"^ {2}(--[\w-]+)", done.stdout, re.M))
    assert options == {
        f"--{o}" for o in set(re.findall(r"--(\w[\w-]*)=\*", SCRIPT.read_text())) | {"spot", "queued", "dry-run"}
    }


PAGE = (ROOT / "launch" / "README.md").read_text()
GRPO = [shlex.split(told.replace("\\\n", "")) for told in re.findall(r"launch/tpu_vm\.sh (?:.*\\\n)*.*tpu/grpo\.py.*", PAGE)]


@pytest.mark.parametrize("words", GRPO, ids=lambda words: words[3].removeprefix("--type="))
def test_reinforcement_learning_by_one_command(world, words):
    options, command = words[1 : words.index("--")], words[words.index("--") + 1 :]
    done = launch(world, "--dry-run", *options, command=command)
    assert done.returncode == 0 and not done.stderr and f"given() {{ {shlex.join(command)}; }}" in done.stdout
    # The recipe is there, and is made for the machine that is asked for: of a v4 the type counts cores, of the others chips.
    config = recipe.opened(next(a for a in command if a.startswith("--config=")).removeprefix("--config="))
    kind, count = next(a for a in options if a.startswith("--type=")).removeprefix("--type=").split("-")
    name, shape = config.topology.split(":")
    chips = int(count) // {"v4": 2, "v5litepod": 1}[kind]
    assert (name, math.prod(map(int, shape.split("x")))) == ({"v5litepod": "v5e"}.get(kind, kind), chips)
    assert config.source == "rollouts" and config.save_every


def test_the_page_of_machines_names_what_exists():
    page = (SCRIPT.parent / "README.md").read_text()
    settings = set(re.findall(r"--config\.([\w.]+)", page))
    assert "mesh.fsdp" in settings
    for name in settings:
        value = recipe.DEFAULTS
        for part in name.split("."):
            assert part in value, f"--config.{name} is no setting"
            value = value[part]
    extras = set(re.findall(r"jaxpost\[(\w+)\]", page))
    assert extras == {"tpu", "cuda"} and all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
    mine = page.split("## tpu_vm.sh")[1].split(" -- ")[0]
    assert set(re.findall(r"--(\w+)", mine)) <= set(re.findall(r"--(\w[\w-]*)", SCRIPT.read_text()))
