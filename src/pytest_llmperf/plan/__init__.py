"""What is measured: frozen values made of plain data, checked when they are made."""
