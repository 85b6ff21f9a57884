"""``compress compare``: runs in one table and chart, with significance tests."""
