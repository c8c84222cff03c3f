"""Every GPU test and measurement, in one command of at most nine minutes."""
