"use strict";
(() => {
  const csrf = document.querySelector("meta[name=csrf]").content;
  const announcer = document.getElementById("announcer");

  const announce = () => {
    const said = [...document.querySelectorAll("#jobs [data-say]")].map(each => each.dataset.say).join(". ");
    if (announcer && announcer.dataset.last !== said) {
      if (announcer.dataset.last !== undefined) announcer.textContent = said;
      announcer.dataset.last = said;
    }
  };
  announce();
  document.addEventListener("htmx:afterSwap", announce);

  const lost = () => {
    const jobs = document.getElementById("jobs");
    if (!jobs || jobs.querySelector(".lost")) return;  // the next answer replaces it
    const said = document.createElement("p");
    said.className = "fault lost";
    said.setAttribute("role", "alert");
    said.textContent = jobs.dataset.lost;
    jobs.prepend(said);
  };
  document.addEventListener("htmx:responseError", lost);
  document.addEventListener("htmx:sendError", lost);

  document.addEventListener("click", event => {
    const button = event.target.closest("[data-copy]");
    if (button) {
      const code = button.parentElement.querySelector("pre");
      getSelection().selectAllChildren(code);
      const done = () => { button.textContent = button.dataset.copied; };
      if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, () => {});
    }
    const back = event.target.closest("[data-back]");
    if (back && history.length > 1) { event.preventDefault(); history.back(); }
  });

  // Where a Save finds no session any more, its answer is another page: what was typed outlives that.
  for (const form of document.querySelectorAll("[data-keep]")) {
    const name = `typed in ${form.action}`;
    const kept = JSON.parse(sessionStorage.getItem(name) || "{}");
    sessionStorage.removeItem(name);
    for (const [key, text] of Object.entries(kept)) {
      const input = form.elements[key], row = "was:" + key.split(":")[1];
      const isMine = input && input.type !== "hidden" && form.elements[row].value === kept[row];
      if (isMine && text.trim().toLowerCase() !== input.value.toLowerCase()) {
        input.value = text;
        document.getElementById(form.dataset.keep).hidden = false;
      }
    }
    form.addEventListener("submit", () => {
      const cells = [...new FormData(form)].filter(([key]) => key.includes(":"));
      try { sessionStorage.setItem(name, JSON.stringify(Object.fromEntries(cells))); } catch { /* full */ }
    });
  }

  document.addEventListener("change", event => {
    const all = event.target.closest("[data-all]");
    if (all) for (const box of all.form.querySelectorAll(`[name=${all.dataset.all}]`)) box.checked = all.checked;
  });

  const put = (url, file, onProgress) => new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", url);
    request.setRequestHeader("X-CSRF-Token", csrf);
    request.upload.onprogress = event => onProgress(event.loaded / Math.max(event.total, 1));
    request.onload = () => request.status < 300 ? resolve(request.responseText) : reject(new Error(request.responseText));
    request.onerror = () => reject(new Error(""));
    request.send(file);
  });

  for (const form of document.querySelectorAll("[data-upload], [data-table]")) {
    form.addEventListener("submit", async event => {
      event.preventDefault();
      const said = form.querySelector(".said"), bar = form.querySelector("progress");
      const button = form.querySelector("button");
      button.disabled = true;
      try {
        for (const file of form.querySelector("input[type=file]").files) {
          const url = form.dataset.table || form.dataset.upload + encodeURIComponent(file.name);
          if (bar) bar.hidden = false;
          await put(url, file, share => { if (bar) bar.value = share; });
        }
        location.reload();
      } catch (error) {
        said.textContent = error.message;
        said.classList.add("fault");
        button.disabled = false;
      }
    });
  }

  const curve = document.getElementById("curve");
  if (curve && curve.dataset.src) {
    const colours = { "train/loss": "#8a5a00", "val/loss": "#b8860b", "val/qwk": "#0b57d0", "val/rps": "#a4330a", "val/accuracy": "#0b6b4f" };
    const dashes = { "train/loss": [6, 4], "val/loss": [2, 3], "val/rps": [10, 4], "val/accuracy": [4, 2] };
    let plot = null, names = "";
    const draw = async () => {
      const response = await fetch(curve.dataset.src).catch(() => null);
      if (!response || !response.ok || response.redirected) return;
      const found = await response.json(), keys = Object.keys(found).filter(key => key !== "epoch");
      const data = [found.epoch, ...keys.map(key => found[key])];
      if (!found.epoch.length) return;
      if (plot && names === keys.join()) { plot.setData(data); return; }
      if (plot) plot.destroy();
      names = keys.join();
      const range = (u, low, high) => [Math.min(0, low ?? 0), Math.max(1, high ?? 1)];
      plot = new uPlot({
        width: curve.clientWidth, height: 260,
        scales: { x: { time: false }, y: { range } },
        axes: [{ stroke: "#55606e", grid: { stroke: "#e6ebf0" }, incrs: [1, 2, 5, 10, 20, 50, 100] }, { stroke: "#55606e", grid: { stroke: "#e6ebf0" } }],
        series: [{ label: "epoch" }, ...keys.map(key => ({ label: key, stroke: colours[key], dash: dashes[key], width: 2, spanGaps: true, points: { show: found.epoch.length < 40 } }))],
      }, data, curve);
    };
    draw();
    if ("live" in curve.dataset) setInterval(draw, 3000);
    addEventListener("resize", () => plot && plot.setSize({ width: curve.clientWidth, height: 260 }));
  }
})();
