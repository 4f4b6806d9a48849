"""The policy `best`: parts of the model that are chosen on a calibration text."""
