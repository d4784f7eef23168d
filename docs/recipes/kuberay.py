"""`python kuberay.py`: writes kuberay.yaml's serveConfigV2 from serve_config.a40.yaml."""

from pathlib import Path

HERE = Path(__file__).parent
# Beyond its own machine the service starts only with keys.
ARGS = "    args:\n"
EDGE = f"""{ARGS}      edge:
        keys_file: /keys/keys # of the secret lda-keys, a line NAME:KEY for each client
"""
BEGIN, END = "  serveConfigV2: |\n", "  rayClusterConfig:\n"


def applications() -> str:
    """What stands below `http_options` there, with keys, indented as the manifest has it."""
    config = (HERE.parents[1] / "serve_config.a40.yaml").read_text()
    config = config[config.index("applications:\n") :].replace(ARGS, EDGE)
    lines = config.splitlines()
    return "".join(f"    {line}".rstrip() + "\n" for line in lines)


def main() -> None:
    manifest = HERE / "kuberay.yaml"
    text = manifest.read_text()
    before, rest = text.split(BEGIN)
    options = rest[: rest.index("    applications:\n")]
    after = rest[rest.index(END) :]
    manifest.write_text(before + BEGIN + options + applications() + after)


if __name__ == "__main__":
    main()
