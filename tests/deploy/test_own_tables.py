"""Two nodes with one table each: a federation of processes has the inputs and the results of a simulation with the same rows."""

import pytest
from federation import values

from clinics import simulated_clinics, write_clinics
from fedloom import tree
from fedloom.deploy.folder import create_deployment
from fedloom.deploy.grid import GridLink
from fedloom.deploy.local import LocalFederation
from fedloom.deploy.running import prepare
from fedloom.deploy.services import free_ports

pytestmark = pytest.mark.deploy


def test_tables_of_two_nodes_give_the_numbers_of_a_simulation(tmp_path):
    files = write_clinics(tmp_path)
    chosen = values(method="fedper", model={"name": "table_mlp", "hidden1": 8}, clients=2) | {
        "data": {
            "name": "clinics",
            "path": str(files["server"]),
            "label": "risk",
            "drop": "note,days",
            "missing": "fill",
        },
        "out": str(tmp_path / "run"),
    }
    proxy, superlink, *runtime = free_ports(4)
    ports = {"proxy": proxy, "superlink": superlink}
    deployment = create_deployment(tmp_path / "federation", chosen, 2, ports=ports, runtime=runtime)
    for i in range(2):
        file = deployment.path / f"node-{i}/node.toml"
        file.write_text(file.read_text().replace('data = "data"', f'data = "{files[f"clinic-{i}"]}"'))
    federation, said = LocalFederation(deployment), []
    try:
        federation.start_server()
        for node in deployment.file.nodes:
            federation.start_node(node)
        link = GridLink(deployment, said.append)
        there = prepare(deployment, chosen, link, said.append)
        there.run()
    finally:
        federation.end()
    here = simulated_clinics(there, files, chosen)
    here.run()
    assert [line for line in said if not line.startswith("waiting")] == []
    assert [row["cohort"] for row in there.rows] == [2, 2]
    assert tree.equal(there.server, here.server)
    assert [row["personal_accuracy"] for row in there.rows] == [row["personal_accuracy"] for row in here.rows]
