"""What tests are made of: schedulers with a made-up worker and clock, made-up devices, models and tenants."""
