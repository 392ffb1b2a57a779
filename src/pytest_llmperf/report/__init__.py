"""Who is told: outcomes become tables, tables become text or JSON. Nothing is measured or decided here."""
