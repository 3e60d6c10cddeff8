"""Networks: pure linen modules that know nothing of noise schedules or samplers."""
