"""Collecting wood from pixels: Crafter and MineRL Treechop."""
