"""``compress validate``: accuracy and calibration of exported models on labeled images."""
