"""A job server without Ray: it speaks the HTTP of Ray's jobs, for one job whose log and end a test decides."""

import asyncio
import threading

from aiohttp import web


class JobServer:
    """Serves on a free port of 127.0.0.1, in a thread. `log` may grow while somebody follows it."""

    def __init__(self, token=None):
        self.token, self.log, self.submitted = token, [], []
        self.details = {"status": "RUNNING", "driver_exit_code": None}
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait(20)

    def end(self, status, code):
        """The job has ended."""
        self.details = {"status": status, "driver_exit_code": code}

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self):
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()

    async def _start(self):
        app = web.Application(middlewares=[self._authenticated])
        app.router.add_get("/api/version", self._version)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._info)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    @web.middleware
    async def _authenticated(self, request, handler):
        if self.token and self.token not in request.headers.get("Authorization", ""):
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return await handler(request)

    async def _version(self, request):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})

    async def _submit(self, request):
        self.submitted.append(await request.json())
        return web.json_response({"job_id": "raysubmit_1", "submission_id": "raysubmit_1"})

    async def _info(self, request):
        fixed = {"type": "SUBMISSION", "submission_id": "raysubmit_1", "entrypoint": "x", "message": ""}
        return web.json_response(fixed | self.details)

    async def _tail(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sent = 0
        while sent < len(self.log) or self.details["status"] == "RUNNING":
            for line in self.log[sent:]:
                await socket.send_str(line)
                sent += 1
            await asyncio.sleep(0.05)
        await socket.close()
        return socket
