"""The command line, `fl-sim`: one function a command; `app` puts them together."""


def main() -> None:
    """Run the command line; see `fl_sim.cli.app`."""
    from fl_sim.cli.app import main

    main()
