"""The commands and their arguments.

A handler is named as `module:function`, and imported when its command runs, so that `--help` is
fast.
"""

from __future__ import annotations

import argparse
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from prefect_flux_kontext import __version__
from prefect_flux_kontext.cli.arguments import (
    CommandParser,
    add_arguments,
    add_display_arguments,
    add_manifest_arguments,
    parse_count,
    parse_pair,
)
from prefect_flux_kontext.sandbox.settings import SandboxSettings

if TYPE_CHECKING:
    _Commands: TypeAlias = argparse._SubParsersAction[CommandParser]  # noqa: SLF001 - as below

# As `--help` shows them; the others follow.
_GROUPS = {
    "batches": ("plan", "run", "status", "collect", "retry-failed", "gallery"),
    "account and styles": ("balance", "styles"),
    "Prefect": ("deploy", "announce", "automations", "limits", "receive"),
    "for $0, on this machine": ("demo", "sandbox"),
}

_EXIT_STATUS = (
    "Exit status: 0 all rows are stored, 1 some rows are not stored, 2 the run could not start."
)

_METAVARS = {
    "mean": "SECONDS",
    "spread": "SHARE",
    "fail_rate": "SHARE",
    "api_key": "KEY",
    "price_pro": "USD",
    "price_pro_official": "USD",
    "price_max": "USD",
    "price_max_official": "USD",
    "balance": "USD",
    "result_lifetime": "SECONDS",
    "references": "FOLDER",
    "fetch_timeout": "SECONDS",
    "long_edge": "PIXELS",
    "callback_timeout": "SECONDS",
    "callback_delay_scale": "FACTOR",
}
"""What the values of the sandbox's options are; all others are numbers, `N`."""

_DAY_SECONDS = 86_400


def create_parser() -> argparse.ArgumentParser:
    """Create the parser of the command line."""
    parser = CommandParser(
        prog="flux-kontext",
        description="Generate and restyle images in batches with the Flux Kontext API.",
        epilog="The environment names the account: FLUX_KONTEXT_API_KEY and "
        "FLUX_KONTEXT_BASE_URL.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", help=argparse.SUPPRESS)
    _add_batch_commands(commands)
    _add_output_commands(commands)
    _add_account_commands(commands)
    _add_prefect_commands(commands)
    _add_sandbox(commands)
    _add_local_commands(commands)
    parser.usage = "%(prog)s [OPTION] COMMAND …"
    # argparse lists all commands in one group, and has no public way to list them in several.
    listed = {action.dest: action for action in commands._choices_actions}  # noqa: SLF001
    groups = {title: [listed.pop(name) for name in names] for title, names in _GROUPS.items()}
    for title, actions in (groups | {"more": listed.values()}).items():
        parser.add_argument_group(title)._group_actions.extend(actions)  # noqa: SLF001
    return parser


def _add_batch_commands(commands: _Commands) -> None:
    plan = commands.add_parser(
        "plan",
        usage="%(prog)s [OPTION …] MANIFEST OUTPUT",
        help="Show what a run would do and cost, and the invalid rows",
        description="Show what a run would do and cost, and the invalid rows. Asks the "
        "service only for the balance of the account. Exit status: 0 all rows are valid, 1 some "
        "rows are invalid, 2 the manifest or the ledger cannot be read.",
    )
    plan.set_defaults(handler="run:show_plan")
    add_manifest_arguments(plan)
    add_display_arguments(plan)

    run = commands.add_parser(
        "run",
        usage="%(prog)s [OPTION …] MANIFEST OUTPUT",
        help="Generate and store the image of every row of a manifest",
        description="Show the plan, then generate and store the image of every row. Stops after "
        "the plan when a row is invalid. Run it again to continue: it pays only for new rows and "
        f"collects outstanding results. {_EXIT_STATUS}",
    )
    run.set_defaults(handler="run:run")
    add_manifest_arguments(run)
    how = run.add_argument_group("how to run")
    how.add_argument(
        "--skip-invalid", action="store_true", help="skip invalid rows and run the others"
    )
    how.add_argument(
        "--callback-url",
        metavar="URL",
        help="public URL of a receiver: wait for callbacks instead of polling; see the settings "
        "FLUX_KONTEXT_CALLBACK_…",
    )
    how.add_argument(
        "--pilot",
        type=parse_count,
        metavar="ROWS",
        help="run a sample with rows of each style first, then ask whether to run the rest; "
        "without a terminal, stop after the sample",
    )
    how.add_argument("-y", "--yes", action="store_true", help="after the pilot, run the rest")
    how.add_argument(
        "--check",
        action="append",
        default=[],
        dest="checks",
        metavar="MODULE:FUNCTION",
        help="own check of the images: takes an image and its row, returns flags; repeatable",
    )
    add_arguments(how, "-n/--dry-run", "--by")
    how.add_argument(
        "--watch", action="store_true", help="serve the live page of `watch` during the run"
    )
    add_display_arguments(run)

    retry = commands.add_parser(
        "retry-failed",
        help="Run the failed rows of a batch again",
        description="Run only the rows in OUTPUT/failed.csv again. Rows that broke the content "
        "rules are not submitted until you change their prompt in that file. "
        f"{_EXIT_STATUS}",
    )
    # failed.csv also lists rows that were skipped as invalid; they must not stop the others.
    retry.set_defaults(handler="run:retry_failed", retry_failed=True, skip_invalid=True)
    add_arguments(retry, "output", "-p/--prompt", "-s/--style", "--fit-references")
    add_arguments(retry, "--budget", "--budget-by", "--by")
    add_display_arguments(retry)

    redo = commands.add_parser(
        "redo",
        help="Make images again that a verdict asks to redo",
        description="Show the plan and the price, then make the images again whose verdict, given "
        "in the live page of `watch`, is redo: with another prompt or style, or as another try. "
        f"Run it again to continue: an image is made once for each verdict. {_EXIT_STATUS}",
    )
    redo.set_defaults(handler="run:redo", skip_invalid=False)
    add_arguments(redo, "output", "-s/--style", "--fit-references", "--budget", "--budget-by")
    add_arguments(redo, "-n/--dry-run")
    add_display_arguments(redo)

    collect = commands.add_parser(
        "collect",
        help="Store the outstanding results of ended runs; submits nothing",
        description="Wait for, download and store the outstanding results of ended runs. Submits "
        f"nothing, so it costs nothing. {_EXIT_STATUS}",
    )
    collect.set_defaults(handler="run:collect")
    add_arguments(collect, "output")
    collect.add_argument(
        "--resume",
        action="store_true",
        help="once everything is stored, resume the suspended flow runs of OUTPUT in the Prefect "
        "at PREFECT_API_URL",
    )
    add_display_arguments(collect)


def _add_output_commands(commands: _Commands) -> None:
    watch = commands.add_parser(
        "watch",
        help="Show the images of an output while a batch runs, and judge them",
        description="Serve the gallery of OUTPUT on this machine until interrupted. Images appear "
        "as they are stored, wherever the batch runs. Verdicts are kept in OUTPUT/_verdicts. "
        "Sends no request to the service.",
    )
    watch.set_defaults(handler="watch:watch")
    add_arguments(watch, "output")
    watch.add_argument("--port", type=parse_count, default=0, help="port (default: a free one)")

    status = commands.add_parser(
        "status",
        help="Show the state of a batch's rows and what was spent",
        description="Read from the ledger how many rows are in which state, what was spent, and "
        "which results are outstanding or unknown. Sends no request to the service.",
    )
    status.set_defaults(handler="output:show_status")
    add_arguments(status, "output", "--by")
    status.add_argument(
        "--verify",
        action="store_true",
        help="list the output to find images that were removed; on a local disk this is always "
        "done, on an object store a listing costs a request for each thousand files",
    )
    add_arguments(status, "--json")

    resolve = commands.add_parser(
        "resolve",
        help="Settle an unknown row",
        description="Settle a row whose submit outcome is unknown: as accepted, if you know its "
        "task (`collect` then stores the image), or as rejected, if you know that the service did "
        "not accept it (the next run then submits it).",
    )
    resolve.set_defaults(handler="output:resolve")
    add_arguments(resolve, "output")
    resolve.add_argument("key", metavar="KEY", help="row key, as `status` shows it")
    outcome = resolve.add_mutually_exclusive_group(required=True)
    outcome.add_argument(
        "--accepted",
        type=str.strip,
        metavar="TASK_ID",
        help="the service accepted the row as this task",
    )
    outcome.add_argument(
        "--rejected", action="store_true", help="the service did not accept the row"
    )

    rebind = commands.add_parser(
        "rebind",
        help="Bind an output to the account of the environment",
        description="Bind the output's ledger to the service FLUX_KONTEXT_BASE_URL and the "
        "account FLUX_KONTEXT_ACCOUNT. Use it if the account got another name, or the service "
        "another address: with a different account, rows paid before could not be collected.",
    )
    rebind.set_defaults(handler="output:rebind")
    add_arguments(rebind, "output")

    repair = commands.add_parser(
        "repair",
        help="Rebuild a ledger's wave files from the records of its rows",
        description="Read the records of all rows, write wave files from them, and remove the old "
        "ones. Use it if a wave file is damaged or was removed. No run may use the output "
        "meanwhile.",
    )
    repair.set_defaults(handler="output:repair")
    add_arguments(repair, "output")

    compact = commands.add_parser(
        "compact",
        help="Pack the ledger's records of stored rows into fewer files",
        description="Move the records of stored rows from three files a row into a few hundred "
        "files in all; of use with 10,000 images and more. Rows that are not stored, or that a "
        "run left behind when it was interrupted, keep their files: collect them first. No run "
        "may use the output meanwhile, and files in it may have to be removed.",
    )
    compact.set_defaults(handler="output:compact")
    add_arguments(compact, "output")

    gallery = commands.add_parser(
        "gallery",
        help="Rebuild the gallery",
        description="Update OUTPUT/results.jsonl with the results of ended runs and rebuild "
        "OUTPUT/gallery.html from the stored images. Sends no request to the service.",
    )
    gallery.set_defaults(handler="output:build_gallery")
    add_arguments(gallery, "output")

    export = commands.add_parser(
        "export",
        help="Copy the images of an output, as files or as a data set",
        description="Copy the stored images of OUTPUT to TARGET: as files with their lines of the "
        "result manifest, or as shards with image, reference, prompt, parameters and verdict of "
        "each row. Sends no request to the service; references are read again.",
    )
    export.set_defaults(handler="output:export")
    add_arguments(export, "output")
    export.add_argument("target", metavar="TARGET", help="folder or prefix for the copies")
    export.add_argument(
        "--kept", action="store_true", help="only images whose verdict is keep (see `watch`)"
    )
    export.add_argument(
        "--format",
        choices=("files", "webdataset", "parquet"),
        default="files",
        help="format of the copies (default: files)",
    )
    export.add_argument(
        "--shard-mb",
        type=parse_count,
        default=500,
        metavar="MB",
        help="size of a shard (default: 500)",
    )
    add_arguments(export, "--json")


def _add_account_commands(commands: _Commands) -> None:
    styles = commands.add_parser(
        "styles",
        help="List the styles with their prompts",
        description="List the built-in styles, or those of a file. The file maps names to "
        "prompts, or to `prompt`, `mode`, `aspect_ratio`, `output_format`, `provider` and "
        "`extra`. A prompt may contain columns, such as {{ material }}.",
    )
    styles.set_defaults(handler="account:list_styles")
    styles.add_argument(
        "file", metavar="FILE", nargs="?", help="path or URL of a YAML or JSON file of styles"
    )

    balance = commands.add_parser(
        "balance",
        help="Show the balance of the account; proves that the key is valid",
        description="Show the balance of the account that FLUX_KONTEXT_API_KEY and "
        "FLUX_KONTEXT_BASE_URL name. Exit status: 0 the key is valid, 2 it is not or the service "
        "cannot be reached.",
    )
    balance.set_defaults(handler="account:show_balance")
    add_arguments(balance, "--json")


def _add_prefect_commands(commands: _Commands) -> None:
    receive = commands.add_parser(
        "receive",
        help="Receive callbacks for batches that run elsewhere or later",
        description="Receive callbacks and answer each one once it is stored: in the ledger of "
        "one batch, or in an inbox for any number of batches. Needs FLUX_KONTEXT_CALLBACK_SECRET, "
        "but no API key and no running batch.",
    )
    receive.set_defaults(handler="receive:receive")
    where = receive.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="the batch's output folder or prefix"
    )
    where.add_argument(
        "--inbox",
        metavar="FOLDER",
        help="folder or prefix for the callbacks of all batches that name it as their "
        "FLUX_KONTEXT_CALLBACK_INBOX",
    )
    _add_address(receive, 8780)
    receive.add_argument(
        "--resume",
        action="store_true",
        help="once every outstanding result of OUTPUT has a callback, resume its suspended flow "
        "runs in the Prefect at PREFECT_API_URL",
    )

    deploy = commands.add_parser(
        "deploy",
        help="Create the deployments of this package in Prefect",
        description="Create or update the seven deployments of this package in the Prefect at "
        "PREFECT_API_URL, for the work pool flux-kontext. Workers need the package and no "
        "checkout.",
    )
    deploy.set_defaults(handler="prefect_commands:deploy")
    deploy.add_argument(
        "manifest", metavar="MANIFEST", help="URL or absolute path that nightly-prefix restyles"
    )
    add_arguments(deploy, "--output")

    announce = commands.add_parser(
        "announce",
        help="Announce a manifest to Prefect, so that a deployment runs it",
        description="Emit the event flux-kontext.manifest.arrived to the Prefect at "
        "PREFECT_API_URL. The deployment manifest-lands takes its parameters from this event.",
    )
    announce.set_defaults(handler="prefect_commands:announce")
    announce.add_argument("manifest", metavar="MANIFEST", help="URL or path of the manifest")
    add_arguments(announce, "--output")
    announce.add_argument(
        "--with",
        dest="payload",
        metavar="NAME=VALUE",
        action="append",
        type=parse_pair,
        default=[],
        help="further value for the event's payload, for triggers of your own; can be repeated",
    )

    automations = commands.add_parser(
        "automations",
        help="Create notification automations",
        description="Create or update three automations in the Prefect at PREFECT_API_URL. They "
        "notify when a batch fails, costs too much, or has results that will soon expire.",
    )
    automations.set_defaults(handler="prefect_commands:notify")
    automations.add_argument(
        "block", metavar="BLOCK", help="saved notification Block, such as slack-webhook/alerts"
    )

    limits = commands.add_parser(
        "limits",
        help="Manage the concurrency limit that partitions of a batch share",
        description="Manage the limit in Prefect that holds the account's slots.",
    )
    actions = limits.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser(
        "create",
        help="Create or update the limit",
        description="Create or update the global concurrency limit from which partitions of a "
        "batch lease the account's slots, in the Prefect at PREFECT_API_URL. The account's label "
        "(FLUX_KONTEXT_ACCOUNT) is part of its name, and the account's slots "
        "(FLUX_KONTEXT_CONCURRENT_TASKS) are its size.",
    )
    create.set_defaults(handler="prefect_commands:limit_slots")
    create.add_argument(
        "--credentials",
        metavar="NAME",
        help="saved credentials Block (default: the account of the environment)",
    )


def _add_sandbox(commands: _Commands) -> None:
    sandbox = commands.add_parser(
        "sandbox",
        help="Serve the Flux Kontext API on loopback, to rehearse for $0",
        description="Serve the whole Flux Kontext API on loopback, so that batches can be "
        "rehearsed for $0. The sandbox really restyles the reference images.",
    )
    sandbox.set_defaults(handler="sandbox:serve_sandbox")
    _add_address(sandbox, 8765)
    for name, field in SandboxSettings.model_fields.items():
        # The options come from the settings, so that both always agree. The text that is given
        # stays a text here: pydantic converts and checks it.
        sandbox.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=_METAVARS.get(name, "N"),
            help=f"{field.description}{_format_default(name, field.default)}",
        )
    sandbox.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:FAULT=SHARE@FIRST-LAST",
        help="inject a fault, such as submit:lost-reply=0.02; can be repeated; `--fault help` "
        "lists all faults",
    )
    sandbox.add_argument(
        "--faults", type=Path, metavar="FILE", help="inject the faults of a JSON or YAML plan"
    )


def _add_local_commands(commands: _Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="Restyle six photographs in five styles through Prefect, for $0",
        description="Start the sandbox and a Prefect server on this machine, restyle six "
        "photographs in five styles as a flow run, stop both, and print where the results are.",
    )
    demo.set_defaults(handler="demo:run_demo")
    demo.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default="demo",
        help="folder for the results (default: %(default)s)",
    )

    completion = commands.add_parser(
        "completion",
        help="Print a script that completes commands in a shell",
        description="Print a script that completes commands, options and files. For bash and zsh: "
        'eval "$(flux-kontext completion bash)". For fish: flux-kontext completion fish | source.',
    )
    completion.set_defaults(handler="completion:print_script", parsers=commands.choices)
    completion.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "fish"))


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=port,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )


def _format_default(name: str, default: Any) -> str:
    """Return the remark on a default; the descriptions of options that are off have their own."""
    if not isinstance(default, int | float | Decimal):
        return ""
    number = f"{default:f}".rstrip("0").rstrip(".") if isinstance(default, float) else f"{default}"
    days, rest = divmod(default, _DAY_SECONDS)
    if _METAVARS.get(name) == "SECONDS" and days and not rest:
        return f" (default: {number}, which is {days:g} days)"
    return f" (default: {number})"
