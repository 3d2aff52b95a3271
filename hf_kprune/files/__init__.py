"""Writing into folders without loss: nothing half-written, nothing replaced that is not ours. It knows no
models.
"""
