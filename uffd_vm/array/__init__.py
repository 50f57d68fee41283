"""The NumPy face: real ndarrays over lazy memory. NumPy is imported when the first array is made."""
