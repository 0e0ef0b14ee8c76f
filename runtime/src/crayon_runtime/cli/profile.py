"""crayon profile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crayon_runtime.cli.common import PATH, backend_option, json_option, note, print_json, print_table

if TYPE_CHECKING:
    from crayon_runtime.profile import Compared, Difference, Profile
    from crayon_runtime.profile.target import Target

_MS = 1e6


class Numbers(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers, as 64,512", param, ctx)


class Share(click.ParamType[float]):
    """A percentage, as 10%."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r} is not a percentage, as 10%", param, ctx)
        if not 0 <= share < 100:
            self.fail(f"{value} is not from 0% on", param, ctx)
        return share


class _Profile(click.Group):
    """`crayon profile BUNDLE` is short for `crayon profile measure BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = ["measure", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Profile)
def profile() -> None:
    """Measure how fast a bundle is on this device, and what changed.

    `crayon profile BUNDLE --out DIR` is short for `crayon profile measure BUNDLE --out DIR`.
    """


@profile.command()
@click.argument("bundle", type=PATH)
@click.option("--out", type=PATH, required=True, help="The folder for the profile; it appears when it is whole.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
@backend_option
@click.option("--adapter", help="Compute everything with this adapter: the name of one inside the bundle, or a path.")
@click.option("--prompt", "prompts", metavar="N,N,…", type=Numbers(), help="Tokens of each prefill.  [default: 64,512]")
@click.option("--generate", metavar="N", type=int, default=32, show_default=True, help="Tokens of each decode.")
@click.option(
    "--depth", "depths", metavar="N,N,…", type=Numbers(), help="Tokens before each decode.  [default: 0,1024]"
)
@click.option(
    "--threads", metavar="N,N,…", type=Numbers(), help="Cores to compute on, in turn.  [default: the backend's choice]"
)
@click.option(
    "--repetitions", metavar="N", type=int, default=5, show_default=True, help="Processes that measure everything anew."
)
@click.option(
    "--long",
    "long_seconds",
    metavar="SECONDS",
    type=float,
    default=0.0,
    help="Decode for so long at the end: heat, throttling, energy.",
)
@click.option(
    "--target",
    metavar="DEVICE",
    default="local",
    show_default=True,
    help="local, ssh://[user@]host[:port], or adb:SERIAL.",
)
@click.option(
    "--wheels", metavar="DIR", type=PATH, help="Over ssh: wheels for the board.  [default: those here, or downloaded]"
)
@click.option(
    "--bench",
    metavar="FILE",
    type=PATH,
    help="Over adb: crayon-bench for the phone.  [default: the one installed here]",
)
@click.option("--app", is_flag=True, help="Over adb: measure in the app, which is on the phone, not by crayon-bench.")
@json_option
def measure(
    bundle: Path,
    out: Path,
    force: bool,
    target: str,
    wheels: Path | None,
    bench: Path | None,
    app: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a bundle.

    Every repetition loads the model anew, in a process of its own. DIR has profile.jsonl, with every sample, profile.csv, and profile.html,
    with plots.
    """
    from crayon_runtime.profile import profile as make

    device = _target(target, wheels, bench, app)
    made = make(bundle, out, replace=force, target=device, on_step=note, **options)
    if as_json:
        print_json({"out": out, "header": made.header, "tests": [_short(made, label) for label in _labels(made)]})
        return
    print_table(
        ["test", "tokens/s", "+-", "ms", "+-", "p50", "p90", "p99"],
        [
            [
                test.label,
                *(_number(value) for value in (test.avg_ts, test.stddev_ts)),
                *(
                    _number(None if value is None else value / _MS)
                    for value in (test.avg_ns, test.stddev_ns, test.p50_ns, test.p90_ns, test.p99_ns)
                ),
            ]
            for test in made.tests
        ],
    )
    for lack in made.absent:
        note(f"absent: {lack.what}: {lack.reason}")
    note(f"{out / 'profile.html'} has the plots")


@profile.command()
@click.argument("profiles", nargs=-1, type=PATH, required=True)
@click.option(
    "--baseline", metavar="FILE", type=PATH, help="What all PROFILES are compared with.  [default: the first]"
)
@click.option(
    "--max-regression",
    metavar="PERCENT",
    type=Share(),
    help="Exit with 1 if a metric is worse for sure, and by more than this, as 10%.",
)
@click.option(
    "--tolerance", metavar="PERCENT", type=Share(), default="2%", show_default=True, help="What is no difference."
)
@json_option
def compare(
    profiles: tuple[Path, ...],
    baseline: Path | None,
    max_regression: float | None,
    tolerance: float,
    as_json: bool,
) -> None:
    """Say what is significantly different between profiles, and by how much.

    PROFILES are folders that `crayon profile` made, or their profile.jsonl. All are compared with the first one, or with --baseline.
    """
    from crayon_runtime.profile import Profile
    from crayon_runtime.profile import compare as compare_profiles

    if baseline is None:
        baseline, *rest = profiles
    else:
        rest = list(profiles)
    if not rest:
        raise click.UsageError("give at least two profiles, or one and --baseline")
    first = Profile.read(baseline)
    found = {path: compare_profiles(first, Profile.read(path), tolerance=tolerance) for path in rest}
    worse = {path: compared.regressions(max_regression or 0.0) for path, compared in found.items()}
    if as_json:
        print_json(
            {
                "baseline": baseline,
                "compared": {str(path): _facts(compared) for path, compared in found.items()},
                "regressions": {str(path): [d.metric for d in differences] for path, differences in worse.items()},
            }
        )
    else:
        for path, compared in found.items():
            _show(baseline, path, compared)
    if max_regression is not None and any(worse.values()):
        for path, differences in worse.items():
            for difference in differences:
                note(f"regression: {path}: {difference.metric} {difference.change:+.1%}")
        click.get_current_context().exit(1)


def _target(text: str, wheels: Path | None, bench: Path | None, app: bool) -> Target | None:
    """The device that an option names; None: this machine."""
    ssh = re.fullmatch(
        r"ssh://((?:[^@:/\s-][^@:/\s]*@)?(?:[^@:/\s\[-][^@:/\s]*|\[[\da-fA-F:.]+\]))(?::(\d{1,5}))?/?", text
    )
    adb = re.fullmatch(r"adb:(\S*)", text)
    for option, given, kind, prefix in (
        ("--wheels", wheels is not None, ssh, "ssh://"),
        ("--bench", bench is not None, adb, "adb:"),
        ("--app", app, adb, "adb:"),
    ):
        if given and not kind:
            raise click.UsageError(f"{option} goes with {prefix}, not with {text}")
    if app and bench is not None:
        raise click.UsageError("either the app measures, or what --bench gives")
    if ssh:
        from crayon_runtime.profile.ssh import Ssh

        return Ssh(ssh[1].replace("[", "").replace("]", ""), int(ssh[2]) if ssh[2] else None, wheels=wheels)
    if adb and app:
        from crayon_runtime.profile.app import App

        return App(adb[1] or None)
    if adb:
        from crayon_runtime.profile.adb import Adb

        return Adb(adb[1] or None, bench=bench)
    if text != "local":
        raise click.BadParameter(
            f"{text!r} is no device: it is local, ssh://[user@]host[:port], or adb:SERIAL", param_hint="--target"
        )
    return None


def _show(baseline: Path, path: Path, compared: Compared) -> None:
    for text in compared.notes:
        note(text)
    print_table(
        [f"{baseline} -> {path}", "before", "after", "change", "from", "to", "p", ""],
        [
            [
                d.metric,
                *(f"{value / _MS:.3f} {'ms' if d.unit == 'ns' else 'MB'}" for value in (d.before, d.after)),
                *(f"{100 * (ratio - 1):+.1f}%" for ratio in (d.compared.ratio, *d.compared.interval)),
                f"{d.p:.3f}",
                _verdict(d),
            ]
            for d in sorted(compared.differences, key=lambda d: (not d.significant, d.control))
        ],
    )
    note(f"{len(compared.significant)} of {len(compared.differences)} metrics are significantly different")


def _verdict(difference: Difference) -> str:
    if not difference.significant:
        return ""
    return "the machine" if difference.control else "worse" if difference.change > 0 else "better"


def _facts(compared: Compared) -> dict[str, Any]:
    return {
        "notes": compared.notes,
        "differences": [
            {
                "metric": d.metric, "unit": d.unit, "control": d.control, "before": d.before, "after": d.after,
                "change": d.change, "interval": [ratio - 1 for ratio in d.compared.interval], "p": d.p, "significant": d.significant,
            }
            for d in compared.differences
        ],
    }  # fmt: skip


def _labels(made: Profile) -> list[str]:
    return [test.label for test in made.tests]


def _short(made: Profile, label: str) -> dict[str, Any]:
    test = next(test for test in made.tests if test.label == label)
    names = ("avg_ts", "stddev_ts", "avg_ns", "stddev_ns", "p50_ns", "p90_ns", "p99_ns", "bandwidth_share")
    return {"label": label, **{name: getattr(test, name) for name in names}}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 100 else f"{value:.0f}"
