"""Which tokens stay: schedules, walks, selection."""
