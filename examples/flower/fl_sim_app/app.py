"""Flower looks for plain assignments here."""

import fl_sim.flower_app

server = fl_sim.flower_app.server
client = fl_sim.flower_app.client
