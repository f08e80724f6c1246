"""`sdan serve`: an HTTP service that zooms photographs.

app.py has the routes and needs no Ray; service.py runs it in Ray Serve.
"""
