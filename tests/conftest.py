from hypothesis import HealthCheck, settings

# A shared machine is no stopwatch: hypothesis must not fail a test for being slow.
settings.register_profile("shared", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
