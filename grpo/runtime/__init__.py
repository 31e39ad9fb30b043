"""The processes of a run, and the machines they run on."""
