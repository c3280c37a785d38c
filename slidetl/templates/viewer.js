"use strict";
// A slide with its map, or one of several. Lengths are in pixels of the finest level on the page ("image"), or of
// the screen.
(() => {
  const all = JSON.parse(document.getElementById("data").textContent);
  const slides = all.slides ?? [all];
  let data = slides[0];
  const stage = document.getElementById("stage");
  const overlay = document.getElementById("overlay");
  const readout = document.getElementById("readout");
  const scaleBar = document.getElementById("scale-bar");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  function sourceOf(slide) {
    const source = new OpenSeadragon.TileSource({
      width: slide.width,
      height: slide.height,
      tileSize: slide.tileSize,
      tileOverlap: 0,
      minLevel: 0,
      maxLevel: slide.levels.length - 1,
    });
    const number = slides.indexOf(slide);
    source.tileExists = (level, x, y) => Boolean(slide.levels[level]?.[`${x}_${y}`]);
    source.getTileUrl = (level, x, y) => `data:image/jpeg;base64,${slide.levels[level][`${x}_${y}`]}`;
    // Else the whole picture would be the key.
    source.getTileHashKey = (level, x, y) => `${number}_${level}_${x}_${y}`;
    return source;
  }

  const viewer = OpenSeadragon({
    element: document.getElementById("viewer"),
    tileSources: sourceOf(data),
    drawer: "canvas",
    showNavigationControl: false,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
    gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
    animationTime: calm ? 0 : 0.4,
    maxZoomPixelRatio: mostZoom(data),
    minZoomImageRatio: 0.8,
    visibilityRatio: 0.5,
    placeholderFillStyle: "#fff",
  });

  function mostZoom(slide) {
    return 4 * Math.max(1, slide.mpp / slide.mppShown);
  }

  let shown = data.maps.length ? 0 : null;
  let opacity = document.getElementById("opacity").valueAsNumber / 100;
  let marked = null; // upper-left corner of the tile that was chosen, image pixels

  let only = null; // the category that is shown alone
  let pictures = picturesOf(data);

  // One pixel per tile: enlarged without smoothing, each is its tile's square.
  function picturesOf(slide) {
    return slide.maps.map(pictureOf);
  }

  function pictureOf(map) {
    const columns = 1 + furthest(map.cells, 0);
    const rows = 1 + furthest(map.cells, 1);
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    map.at = new Map();
    map.cells.forEach(([column, row], tile) => {
      const alpha = only === null || map.shades[tile] === only ? 255 : 0;
      image.data.set([...map.colours[map.shades[tile]], alpha], 4 * (row * columns + column));
      map.at.set(`${column}_${row}`, tile);
    });
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function furthest(cells, axis) {
    return cells.reduce((most, cell) => Math.max(most, cell[axis]), 0);
  }

  function toScreen(x, y) {
    return viewer.world.getItemAt(0).imageToViewerElementCoordinates(new OpenSeadragon.Point(x, y));
  }

  function draw() {
    if (!viewer.world.getItemCount()) return;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(stage.clientWidth * ratio);
    const height = Math.round(stage.clientHeight * ratio);
    if (overlay.width !== width || overlay.height !== height) Object.assign(overlay, { width, height });
    const context = overlay.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, stage.clientWidth, stage.clientHeight);
    context.imageSmoothingEnabled = false;
    if (shown !== null) {
      const picture = pictures[shown];
      const from = toScreen(...data.cellOrigin);
      const to = toScreen(
        data.cellOrigin[0] + picture.width * data.cellSize[0],
        data.cellOrigin[1] + picture.height * data.cellSize[1],
      );
      context.globalAlpha = opacity;
      context.drawImage(picture, from.x, from.y, to.x - from.x, to.y - from.y);
      context.globalAlpha = 1;
    }
    if (marked) {
      const from = toScreen(...marked);
      const to = toScreen(marked[0] + data.tileExtent[0], marked[1] + data.tileExtent[1]);
      for (const [colour, line] of [["#fff", 5], ["#0b57d0", 2.5]]) {
        context.strokeStyle = colour;
        context.lineWidth = line;
        context.strokeRect(from.x, from.y, to.x - from.x, to.y - from.y);
      }
    }
    drawScaleBar();
  }

  function drawScaleBar() {
    const mpp = data.mpp / (toScreen(1, 0).x - toScreen(0, 0).x);
    const longest = mpp * 120;
    const power = 10 ** Math.floor(Math.log10(longest));
    const length = [5, 2, 1].map((factor) => factor * power).find((length) => length <= longest);
    scaleBar.style.width = `${length / mpp}px`;
    scaleBar.firstElementChild.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
  }

  function say(event) {
    const box = stage.getBoundingClientRect();
    const item = viewer.world.getItemAt(0);
    if (shown === null || !item) return;
    const point = new OpenSeadragon.Point(event.clientX - box.left, event.clientY - box.top);
    const at = item.viewerElementToImageCoordinates(point);
    const map = data.maps[shown];
    const column = Math.floor((at.x - data.cellOrigin[0]) / data.cellSize[0]);
    const row = Math.floor((at.y - data.cellOrigin[1]) / data.cellSize[1]);
    const tile = map.at.get(`${column}_${row}`);
    if (tile === undefined) readout.textContent = "";
    else if (map.categories.length) readout.textContent = map.categories[map.shades[tile]];
    else readout.textContent = `${map.name}: ${map.values[tile].toFixed(2)} ${map.unit}`;
  }

  function zoomBy(factor) {
    viewer.viewport.zoomBy(factor);
    viewer.viewport.applyConstraints();
  }

  viewer.addHandler("update-viewport", draw);
  viewer.addHandler("resize", draw);
  viewer.addHandler("open", () => {
    draw();
    // Tiles that are shown below lie in the slide too, where they are finer than what the page affords there.
    for (const button of document.querySelectorAll("button.tile")) {
      if (slides[button.dataset.slide ?? 0] !== data) continue;
      const picture = button.querySelector("img");
      if (!picture || data.mppShown > data.mpp * 0.9) continue;
      const [x, y] = button.dataset.place.split(",").map(Number);
      const whole = viewer.world.getItemAt(0);
      const bounds = whole.imageToViewportRectangle(x, y, data.tileExtent[0], data.tileExtent[1]);
      viewer.addSimpleImage({ url: picture.src, x: bounds.x, y: bounds.y, width: bounds.width });
    }
    document.body.dataset.ready = "";
    if (marked) goTo();
  });

  function open(slide, place) {
    marked = place;
    if (slide === data) {
      draw();
      if (marked) goTo();
      return;
    }
    data = slide;
    pictures = picturesOf(data);
    if (chooser) chooser.value = slides.indexOf(data);
    viewer.viewport.maxZoomPixelRatio = mostZoom(data);
    viewer.open(sourceOf(data));
  }

  function goTo() {
    const [width, height] = data.tileExtent;
    const item = viewer.world.getItemAt(0);
    viewer.viewport.fitBounds(
      item.imageToViewportRectangle(marked[0] - width, marked[1] - height, 3 * width, 3 * height),
    );
  }

  const chooser = document.getElementById("choose-slide");
  chooser?.addEventListener("change", () => open(slides[chooser.value], null));
  document.getElementById("choose-category")?.addEventListener("change", (event) => {
    only = event.target.value === "" ? null : Number(event.target.value);
    pictures = picturesOf(data);
    draw();
  });

  viewer.element.addEventListener("pointermove", say);
  viewer.element.addEventListener("pointerleave", () => { readout.textContent = ""; });
  document.getElementById("opacity").addEventListener("input", (event) => {
    opacity = event.target.valueAsNumber / 100;
    draw();
  });
  document.getElementById("zoom-in").addEventListener("click", () => zoomBy(2));
  document.getElementById("zoom-out").addEventListener("click", () => zoomBy(0.5));
  document.getElementById("zoom-home").addEventListener("click", () => {
    marked = null;
    viewer.viewport.goHome();
    draw();
  });
  for (const radio of document.querySelectorAll("input[name=map]")) {
    radio.addEventListener("change", () => {
      shown = radio.value === "" ? null : Number(radio.value);
      for (const legend of document.querySelectorAll(".legend")) {
        legend.hidden = Number(legend.dataset.map) !== shown;
      }
      readout.textContent = "";
      draw();
    });
  }
  for (const button of document.querySelectorAll("button.tile")) {
    button.addEventListener("click", () => {
      const like = document.getElementById("like");
      like.querySelector("code").textContent = button.dataset.command;
      like.hidden = false;
      open(slides[button.dataset.slide ?? 0], button.dataset.place.split(",").map(Number));
      stage.scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" });
    });
  }
})();
