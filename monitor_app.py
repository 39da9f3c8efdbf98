"""What `streamlit run` is given: the page, the HTTP door and the sampler of the queues' history.

    streamlit run monitor_app.py

`toolkit monitor` starts the same from anywhere, and Flower with it when asked.
"""

import streamlit as st

from toolkit.monitor.http import lifespan, middleware, routes

# Streamlit finds this by reading the file: it has to stay one assignment.
app = st.App(
    "toolkit/monitor/page.py",
    routes=routes(),
    middleware=middleware(
        st.get_option("server.address"), lambda: st.get_option("server.allowedHosts")
    ),
    lifespan=lifespan,
)
