"""Engines that sample, whether a run fits a card, and programs over trained policies."""
