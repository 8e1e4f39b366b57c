"""Is what runs still the model? A ladder of rungs, P1 to P5, with a gate on top.

``gate`` climbs it; each rung is a file that asks one question and answers with findings; ``scenarios`` says what is
fed, ``metrics`` how two answers differ, ``tolerances`` how much they may.
"""
