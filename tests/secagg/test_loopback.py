"""A SuperLink and three SuperNodes on the loopback interface: TLS, node keys, rosters, journals."""

import contextlib
import datetime
import ipaddress
import json
import os
import re
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from dpfl_flower.simulation import run_on_connection
from dpfl_flower.simulation.processes import MARK, new_mark, stop_marked

ROOT = Path(__file__).parents[2]
NODES = 3
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "loopback"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<2"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "dpfl"

[tool.flwr.app.components]
serverapp = "loopback.server_app:app"
clientapp = "loopback.client_app:app"

[tool.flwr.app.config]
out = ""
"""
CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from dpfl_flower.client import secure_aggregation_mod

app = ClientApp()

@app.train(mods=[secure_aggregation_mod])
def train(message, context):
    step = np.float32(0.1) * (1 + context.node_config["partition-id"])
    arrays = ArrayRecord({"w": Array(message.content["arrays"]["w"].numpy() + step)})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""
SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from dpfl_flower.accounting import EveryoneSampling
from dpfl_flower.clipping import FixedClipping
from dpfl_flower.secagg import SecAggPlus
from dpfl_strategies import DPFedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    strategy = DPFedAvg(
        noise_multiplier=0.0, relation="zero-out", sampling=EveryoneSampling(3),
        clipping=FixedClipping(10.0), secure_aggregation=SecAggPlus(rosters=True),
    )
    start = ArrayRecord({"w": Array(np.zeros(100, np.float32))})
    result = strategy.start(grid, start, num_rounds=1, timeout=300)
    np.save(context.run_config["out"], result.arrays["w"].numpy())
"""


def write_private(path, key, form=PrivateFormat.OpenSSH):
    path.write_bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))
    path.chmod(0o600)


def public_line(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def certificate(folder):
    """Write a certificate that signs itself, for the loopback address."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            ),
            critical=False,
        )
        .sign(key, SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(Encoding.PEM))
    write_private(folder / "server.key", key, PrivateFormat.PKCS8)


def free_port():
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_three_supernodes_give_the_exact_mean(tmp_path, monkeypatch):
    mark = new_mark()
    scripts = sysconfig.get_path("scripts")
    for name in [n for n in os.environ if n.startswith(("FLWR_", "RAY_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("PATH", os.pathsep.join([scripts, os.environ["PATH"]]))
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    package = tmp_path / "app" / "loopback"
    package.mkdir(parents=True)
    (tmp_path / "app" / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(CLIENT)
    (package / "server_app.py").write_text(SERVER)
    certificate(tmp_path)
    port = free_port()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        '[superlink]\ndefault = "hospital"\n\n[superlink.hospital]\n'
        f'address = "127.0.0.1:{port}"\nroot-certificates = "{tmp_path / "ca.crt"}"\n'
    )
    identities = [Ed25519PrivateKey.generate() for _ in range(NODES)]
    (tmp_path / "roster").write_bytes(b"\n".join(map(public_line, identities)))

    def start(name, *command):
        log = (tmp_path / f"{name}.log").open("wb")
        with log:
            return subprocess.Popen(
                command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    started = []
    try:
        started.append(
            start(
                "superlink",
                *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
                *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "ca.crt"),
                *("--ssl-keyfile", "server.key", "--enable-supernode-auth"),
                *("--database", "state.db", "--disable-runtime-dependency-installation"),
            )
        )
        for i, identity in enumerate(identities):
            key = ec.generate_private_key(ec.SECP384R1())
            write_private(tmp_path / f"sn{i}", key)
            (tmp_path / f"sn{i}.pub").write_bytes(public_line(key) + b"\n")
            write_private(tmp_path / f"id{i}", identity)
            register(tmp_path / f"sn{i}.pub", f"sn{i}")
            config = (
                f"partition-id={i} num-partitions={NODES} secagg-identity='{tmp_path / f'id{i}'}' "
                f"secagg-roster='{tmp_path / 'roster'}' secagg-journal='{tmp_path / f'journal{i}'}'"
            )
            started.append(
                start(
                    f"supernode{i}",
                    *("flower-supernode", "--root-certificates", "ca.crt"),
                    *("--superlink", f"127.0.0.1:{port}"),
                    *("--auth-supernode-private-key", f"sn{i}"),
                    *("--host", "127.0.0.1", "--port", str(free_port())),
                    *("--node-config", config),
                )
            )
        run = run_on_connection(
            tmp_path / "app",
            "hospital",
            log_path=tmp_path / "run.log",
            run_config={"out": str(tmp_path / "model.npy")},
            timeout_seconds=560,
        )
    finally:
        for process in started:
            process.terminate()
        monkeypatch.undo()
        stop_marked(mark, roots=tuple(process.pid for process in started))
        for process in started:
            process.wait()
    log = (tmp_path / "run.log").read_text()
    assert run.completed, log + (tmp_path / "superlink.log").read_text()
    model = np.load(tmp_path / "model.npy")
    np.testing.assert_allclose(model, 0.1 * (1 + 2 + 3) / 3, rtol=1e-5)
    assert not re.search("abandoned|error code", log)
    for i in range(NODES):
        lines = (tmp_path / f"journal{i}").read_text().splitlines()
        assert [json.loads(line)[2:] for line in lines] == [[1, stage] for stage in range(1, 6)]


def register(public, name):
    """Register a SuperNode's key, once the SuperLink is up."""
    for _ in range(60):
        done = subprocess.run(
            ["flwr", "supernode", "register", str(public), "hospital", "--name", name],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        if done.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(done.stdout + done.stderr)
