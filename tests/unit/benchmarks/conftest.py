from tests.unit.sim.conftest import crowd, run, small

__all__ = ["crowd", "run", "small"]
