"""The demo's flow run: `python -m prefect_flux_kontext.cli.demo_flow MANIFEST OUTPUT STYLE …`.

A process of its own, so that it has told Prefect everything when it ends. Prints the id of the
flow run and the summary as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys

from prefect_flux_kontext.flows import style_transfer_batch


async def _main(manifest: str, output: str, *styles: str) -> None:
    state = await style_transfer_batch(manifest, output, styles=list(styles), return_state=True)
    summary = await state.aresult()
    flow_run_id = str(state.state_details.flow_run_id)
    print(json.dumps({"flow_run_id": flow_run_id, "summary": str(summary)}))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
