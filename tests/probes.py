"""Asks over HTTP as a kubelet does."""

import http.client


def answer(port, timeout_s, path="/"):
    """As a kubelet's httpGet: the status, 0 if none came in time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except TimeoutError:
        return 0
    finally:
        connection.close()
