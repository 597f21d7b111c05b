"""The queue and the lease: pure decisions in decide.py, effects on processes in processes.py and supervisor.py."""
